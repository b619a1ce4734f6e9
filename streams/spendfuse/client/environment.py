"""The settings of a client: from the environment, with what the caller gives in their place."""

from collections.abc import Mapping

from spendfuse.settings import Settings, SettingsError


def check_names(overrides: Mapping[str, object], *kinds: type[Settings]) -> None:
    """Raise SettingsError naming each override that no kind of settings has."""
    known = {name for kind in kinds for name in kind.model_fields}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise SettingsError(f"no such settings: {', '.join(unknown)}; there are {', '.join(sorted(known))}")


def own(overrides: Mapping[str, object], kind: type[Settings]) -> dict[str, object]:
    """Return the overrides that are settings of a kind."""
    return {name: value for name, value in overrides.items() if name in kind.model_fields}
