"""The report of `patch`."""

from dataclasses import dataclass, field


@dataclass
class PatchReport:
    """What `patch` has changed and skipped.

    Attributes:
        patched: paths of the layers that mix adapters.
        skipped: the reason for each layer that matched but was not patched, by its path.
        unmatched: names in `target_modules` that match no module of the model.
        prompted: paths of the modules that read prompts (with `adapter="prompt"`, where no layer
            is patched).
        notes: further behaviour that users may not expect.
    """

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    prompted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """All places that the method changes."""
        return [*self.patched, *self.prompted]

    def __str__(self) -> str:
        if self.prompted:
            lines = [f"prompts are read by {', '.join(self.prompted)}; no layer is patched"]
        else:
            lines = [f"{len(self.patched)} layers patched, {len(self.skipped)} skipped"]
        lines += [f"  skipped {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"  {name!r} matches nothing" for name in self.unmatched]
        return "\n".join(lines + [f"  {note}" for note in self.notes])
