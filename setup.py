"""Lists the packages; everything else stands in pyproject.toml.

Two of the three folders are mapped into the package (``tool.setuptools.package-dir``), and neither
a static list nor setuptools' own discovery would follow when one of them gains a sub-package.
"""

from setuptools import find_packages, setup

MAPPED = ("kernels", "lightning_modules")

setup(
    packages=find_packages(include=["qgnn_plugin", "qgnn_plugin.*"])
    + [
        f"qgnn_plugin.{name}"
        for folder in MAPPED
        for name in find_packages(include=[folder, f"{folder}.*"])
    ]
)
