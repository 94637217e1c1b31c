"""Every way fewbit can refuse or fail, as one small family of exceptions.

An error carries a stable code (`FB-E0105`), the sentence of what happened, the tensor and file it is about, and the remedy.
The codes live in `errors.toml` beside this file: one row each, read by `fewbit explain CODE` and checked by a test against
the codes that the source raises. The class of an error decides the exit status of the command line.
"""

from __future__ import annotations

import functools
import tomllib
from importlib import resources


class FewbitError(Exception):
    """Root of all fewbit errors; itself means a fault of ours (exit status 1).

    Args:
        code: a row of `errors.toml`.
        message: what was given and what is needed, in one sentence.
        tensor: name of the tensor concerned, if any.
        file: path of the file concerned, if any.
        remedy: what the user can do; the default stands in `errors.toml`.
    """

    exit_status = 1

    def __init__(
        self, code: str, message: str, *, tensor: str | None = None, file: object = None, remedy: str | None = None
    ) -> None:
        self.code = code
        self.message = message
        self.tensor = tensor
        self.file = str(file) if file is not None else None
        self.remedy = remedy or catalogue().get(code, {}).get("remedy")
        super().__init__(code, message)

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.tensor, self.file) if part)
        return " | ".join(part for part in (f"{self.code} {self.message}", where, self.remedy) if part)

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.code, self.message, self.tensor, self.file, self.remedy)

    def record(self) -> dict[str, str | None]:
        """The error as plain data, for `--json`."""
        return {
            "code": self.code,
            "message": self.message,
            "tensor": self.tensor,
            "file": self.file,
            "remedy": self.remedy,
        }


class InputError(FewbitError):
    """Bad input: a file, a config, a recipe or an option (exit status 2)."""

    exit_status = 2


class ResourceError(FewbitError):
    """Refused for want of memory, disk or device (exit status 3)."""

    exit_status = 3


class QualityError(FewbitError):
    """A quality gate or an audit failed (exit status 4)."""

    exit_status = 4


class Interrupted(FewbitError):
    """Stopped by the user or the system; the run can be resumed (exit status 130)."""

    exit_status = 130


class Refusals(InputError):
    """Several refusals found before any work, reported together.

    The exit status is 3 when every one of them is about resources, else 2.
    """

    def __init__(self, errors: list[FewbitError]) -> None:
        self.errors = errors
        lines = "\n".join(f"  {error}" for error in errors)
        super().__init__("FB-E0400", f"refused before any work, {len(errors)} reason(s):\n{lines}")
        if errors and all(isinstance(error, ResourceError) for error in errors):
            self.exit_status = ResourceError.exit_status

    def __reduce__(self) -> tuple:
        return Refusals, (self.errors,)

    def record(self) -> dict:
        return {**super().record(), "errors": [error.record() for error in self.errors]}


def _rebuild(cls: type, code: str, message: str, tensor: str | None, file: str | None, remedy: str | None) -> Exception:
    return cls(code, message, tensor=tensor, file=file, remedy=remedy)


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    """All error codes: code -> {title, explain, remedy}."""
    return tomllib.loads(resources.files(__package__).joinpath("errors.toml").read_text(encoding="utf-8"))
