"""What was checked, and whether it held."""

from dataclasses import dataclass
from typing import Any

from atpatch_onnx.errors import VerificationError


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of one patched model."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_if_failed(self) -> None:
        """Raise where a check failed.

        Raises:
            VerificationError: At least one check failed; the error names them all.
        """
        if not self.passed:
            raise VerificationError(
                "the patched model",
                expected=f"all {len(self.checks)} checks to pass",
                found="; ".join(f"{check.name}: {check.detail}" for check in self.failures),
                advice="Do not ship this file: bake the patch into the base again.",
            )

    def to_json(self) -> dict[str, Any]:
        """The checks as plain JSON types."""
        return {
            "passed": self.passed,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
        }
