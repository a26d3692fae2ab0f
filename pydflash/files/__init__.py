"""Files: GGUF read, checked and written, drafts converted, and files replaced whole or not at all."""

from pydflash.files.atomic_file import check_output, replacing
from pydflash.files.gguf import GGUFFile, TensorInfo
from pydflash.files.gguf_writer import TensorSource, write_gguf

__all__ = ["GGUFFile", "TensorInfo", "TensorSource", "check_output", "replacing", "write_gguf"]
