"""Custom nodes for ComfyUI that decode latents on a PiD decode server."""

try:
    import pid_client  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "The PiD nodes need the package pid-decode-client in the Python environment of ComfyUI; see their README.md."
    ) from error

from .nodes import PidDecode, PidStopEarly

NODE_CLASS_MAPPINGS = {"PidDecode": PidDecode, "PidStopEarly": PidStopEarly}
NODE_DISPLAY_NAME_MAPPINGS = {"PidDecode": "PiD decode (remote)", "PidStopEarly": "PiD stop early"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
