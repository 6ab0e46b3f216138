"""Packed models as ONNX files, with their ops in a domain of their own or spelled out in standard ones."""

from .export import DOMAIN, export_onnx

__all__ = ["DOMAIN", "export_onnx"]
