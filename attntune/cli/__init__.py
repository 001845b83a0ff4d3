"""The command line: one verb a file, each a thin caller of the public API."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

#: Whether the user chose how tvm_ffi meets torch; :func:`main` chooses for the others.
TORCH_EXTENSION_VARIABLE = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
torch_extension_chosen = TORCH_EXTENSION_VARIABLE in os.environ


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``attntune`` command with ``arguments`` (default: the process's) and return its exit code.

    0 is success, 1 a failed check (``doctor``, ``compare``), 2 an error with a message, 130 an interrupt.
    """
    # With torch installed, tvm_ffi otherwise compiles an extension for half a minute on its first import.
    os.environ.setdefault(TORCH_EXTENSION_VARIABLE, "1")
    import typer

    from attntune.cli.app import build

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = build()(args=words, prog_name="attntune", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # A usage error: click's class, which typer ships under a private name.
        if not hasattr(error, "format_message") or not hasattr(error, "show"):
            raise
        if "--json" in words:
            print(json.dumps({"error": {"type": "UsageError", "message": error.format_message()}}))
        else:
            error.show()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0
