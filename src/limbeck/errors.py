"""Everything that can go wrong, as one small tree.

LimbeckError                   exit code 2: the user's mistake unless a subclass says otherwise
├── RecipeError                a setting: misspelt, of the wrong type, without effect, impossible
├── SourceError                a model or data source: missing, corrupt, unsafe, unreachable
├── DataError                  the data itself: a missing column, no rows, labels that do not fit
├── RunFolderError             the run folder: holds another recipe, is in use, cannot be written
├── AxisError                  an architecture: an axis that is not there or could not be proved
├── MissingExtraError          an optional dependency that is not installed
├── TargetMissedError          exit code 3: a budget or a floor that the measurement shows unmet
└── DamagedError               exit code 4: stored data whose checksum no longer fits

Every message has four parts: where, as the user wrote it; what was found; what is allowed; what
to do. `LimbeckError(where, found, allowed=..., fix=...)` joins them into one sentence.
"""


class LimbeckError(Exception):
    """A message in four parts; `str(error)` is what a person reads."""

    exit_code = 2

    def __init__(self, where: str, found: str, *, allowed: str = "", fix: str = "") -> None:
        super().__init__(where, found, allowed, fix)  # all four as args: stays picklable
        self.where, self.found, self.allowed, self.fix = where, found, allowed, fix

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.where, self.found, self.allowed, self.fix))

    def __str__(self) -> str:
        allowed = f"allowed: {self.allowed}" if self.allowed else ""
        return f"{self.where}: " + "; ".join(p for p in (self.found, allowed, self.fix) if p)


def _rebuild(
    kind: type[LimbeckError], where: str, found: str, allowed: str, fix: str
) -> LimbeckError:
    return kind(where, found, allowed=allowed, fix=fix)


class RecipeError(LimbeckError): ...


class SourceError(LimbeckError): ...


class DataError(LimbeckError): ...


class RunFolderError(LimbeckError): ...


class AxisError(LimbeckError): ...


class MissingExtraError(LimbeckError):
    @classmethod
    def of(cls, purpose: str, extra: str) -> "MissingExtraError":
        return cls(
            purpose, "an optional dependency is missing", fix=f"pip install 'limbeck[{extra}]'"
        )


class TargetMissedError(LimbeckError):
    exit_code = 3


class DamagedError(LimbeckError):
    exit_code = 4
