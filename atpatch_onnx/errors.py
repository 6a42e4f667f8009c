"""One exception family: every error says where, what was expected, what was found and what to do next."""

from importlib.util import find_spec


class AtPatchError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        where: The file, value, site or option that the error is about.
        expected: What should have been there.
        found: What was there instead.
        advice: What the user can do next.
    """

    def __init__(self, where: str, *, expected: str, found: str, advice: str) -> None:
        self.where = where
        self.expected = expected
        self.found = found
        self.advice = advice
        super().__init__(f"{said(where)}: expected {said(expected)}; found {said(found)}. {said(advice)}")

    def __reduce__(self) -> tuple[object, ...]:
        """Goes from a worker to who gave it the work."""
        return _again, (type(self), self.where, self.expected, self.found, self.advice)


def _again(kind: type[AtPatchError], where: str, expected: str, found: str, advice: str) -> AtPatchError:
    """The same error in another process; not all kinds take these arguments."""
    error = kind.__new__(kind)
    AtPatchError.__init__(error, where, expected=expected, found=found, advice=advice)
    return error


LONGEST = 2000
"""Characters of one part of a message: a name in a file may be of any length."""


def printable(text: object) -> str:
    """Text that is safe to show: what cannot be printed (escapes, bidirectional overrides) is spelt out."""
    return "".join(char if char.isprintable() else f"\\u{{{ord(char):x}}}" for char in str(text))


def said(text: object) -> str:
    """Text as a part of a message: one line, safe to show, and not without an end."""
    found = printable(" ".join(str(text).split()))
    return found if len(found) <= LONGEST else f"{found[:LONGEST]}..."


def one_line(error: BaseException) -> str:
    """An error of another library as one line of text."""
    return said(f"{type(error).__name__}: {error}")


class ModelFileError(AtPatchError):
    """A model file cannot be read or written, or its external data is not where it may be."""


class NoSiteError(AtPatchError):
    """No attention site was found, or a named one does not exist."""


class PatchFileError(AtPatchError):
    """A patch file is damaged, foreign, or of a schema this version does not read."""


class PatchMismatchError(AtPatchError):
    """A patch was fitted on another model than the one it is applied to."""


class DebugSetError(AtPatchError):
    """A debug set does not fit the model, or cannot support what is asked of it."""


class FitError(AtPatchError):
    """The fit cannot produce a patch."""


class TargetMissedError(FitError):
    """The fitted patch does not reach its target on the validation part."""


class BakeError(AtPatchError):
    """A patch cannot be baked into this model."""


class UnbakeError(AtPatchError):
    """A patch cannot be taken out of a model: what remains would not be its base."""


class InvariantError(AtPatchError):
    """A patched graph breaks a rule that every patched graph must obey."""


class VerificationError(AtPatchError):
    """A patched model differs from its base where it must not."""


class RunError(AtPatchError):
    """The runtime refused a model or an input."""


class BenchmarkError(AtPatchError):
    """A patch cannot be timed as asked."""


class ServingError(AtPatchError):
    """A model cannot be served as asked, or a serving stack's files cannot be written."""


class SignatureError(AtPatchError):
    """A patched file cannot be signed, or is not what was signed."""


class InversionError(AtPatchError):
    """No trigger can be searched for, or no class stands out."""


class DiscoveryError(AtPatchError):
    """A model cannot be searched as asked, with these inputs."""


class MissingExtraError(AtPatchError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            purpose,
            expected=f"the package {package}",
            found="it is not installed",
            advice=f"Install it with: pip install 'atpatch-onnx[{extra}]'",
        )


def require(package: str, extra: str, purpose: str) -> None:
    """Check that an optional package is installed before work begins that needs it.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)


def check_options(options: object, error: type[AtPatchError], **checks: tuple[bool, str]) -> None:
    """Refuse options whose check does not hold: by name, whether it holds and what is expected.

    Raises:
        AtPatchError: `error`, for the first that does not.
    """
    for name, (holds, expected) in checks.items():
        if not holds:
            found = repr(getattr(options, name))
            raise error(f"option {name}", expected=expected, found=found, advice="Choose an allowed value.")


def check_at_least(options: object, error: type[AtPatchError], **least: int) -> None:
    """The same for options with a smallest value."""
    check_options(
        options, error, **{n: (getattr(options, n) >= bound, f"at least {bound}") for n, bound in least.items()}
    )
