"""State dicts of converted layers: they carry the configuration of each layer and refuse another one."""

from __future__ import annotations

from typing import Any

from ..config import OFF
from ..saved import CONFIG_KEY, encode, refusal, refuse

__all__ = ["CarriesConfiguration"]


class CarriesConfiguration:
    """Mixin of converted layers: one more entry in the state dict, beside whatever the layer's own class saves.

    It holds the layer's configuration, from which :func:`qgnn_plugin.quantize_like` converts, and the settings that
    decide what the layer computes, which are compared when a state dict is loaded.  Those of a quantizer are its own
    extra state.  State dicts without such entries, of float models and of version 1, load as ever.
    """

    def computing_settings(self: Any) -> dict[str, Any]:
        """What decides, beside the quantizers, what this layer computes."""
        smp, place = getattr(self, "_smp", None), getattr(self, "_deep_place", None)
        return {
            "output": type(self).quantizes_output,
            "attention_bits": getattr(self, "attention_bits", OFF),
            **{f"smp.{name}": value for name, value in ({} if smp is None else smp.acting()).items()},
            "deep_place": None if place is None else [place.depth, place.length],
        }

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        saved = {"version": 1, "config": self._quant_config.to_dict(), "settings": self.computing_settings()}
        destination[prefix + CONFIG_KEY] = encode(saved)

    def _load_from_state_dict(
        self: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = state_dict.pop(prefix + CONFIG_KEY, None)
        message = None if state is None else refusal(self._qualified_name, self.computing_settings(), state, "settings")
        if message is not None:
            refuse(error_msgs, message)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
