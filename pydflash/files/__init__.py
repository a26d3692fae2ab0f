"""Files: GGUF read, checked and written, drafts converted, and files replaced whole or not at all."""

from pydflash.files.atomic_file import check_output, replacing
from pydflash.files.gguf import GGUFFile, TensorInfo
from pydflash.files.gguf_writer import TensorSource, write_gguf
from pydflash.files.unread import check_patterns, matcher, patterns_by_file, refuse_unread

__all__ = [
    "GGUFFile",
    "TensorInfo",
    "TensorSource",
    "check_output",
    "check_patterns",
    "matcher",
    "patterns_by_file",
    "refuse_unread",
    "replacing",
    "write_gguf",
]
