"""The entries of `model.mixers`: each has the keys of its kind. Reads old configs, whose model has one mixer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from hopescale.common.errors import Problem
from hopescale.config.schema import KINDS, MixerConfig

FIRST_KIND = MixerConfig().kind
OLD_NAMES = {"self_modifying": "hope", "attention": "attention"}
"""Names of the mixers of old configs, by kind: those of the shipped recipes."""


def begin_anew(trees: Sequence[dict[str, Any]]) -> dict[str, MixerConfig]:
    """Find the kind of each mixer and return its defaults; settings for another kind are dropped.

    Args:
        trees: Values of configs, later ones winning; changed in place.
    """
    kinds: dict[str, str] = {}
    for number, tree in enumerate(trees):
        for name, entry in (tree.get("model", {}).get("mixers") or {}).items():
            kind = None if entry is None else entry.get("kind", kinds.get(name, FIRST_KIND))
            if kind == kinds.get(name):
                continue
            for earlier in trees[:number]:
                earlier.get("model", {}).get("mixers", {}).pop(name, None)
            kinds.pop(name, None)
            if kind is not None:
                kinds[name] = kind
    return {name: KINDS[kind]() for name, kind in kinds.items()}


def misplaced(tree: dict[str, Any], kinds: Mapping[str, MixerConfig], origin: str) -> Iterator[Problem]:
    """Find the keys that a mixer's kind does not have, and take them out."""
    for name, entry in tree.get("model", {}).get("mixers", {}).items():
        known = get_type_hints(type(kinds[name])) if entry is not None else {}
        for key in [key for key in entry or {} if key not in known]:
            del entry[key]
            owners = " and ".join(kind for kind, mixer in KINDS.items() if key in get_type_hints(mixer))
            hint = f"it is a key of {owners}: leave it out, or set model.mixers.{name}.kind"
            yield Problem(f"model.mixers.{name}.{key}", f"no key of kind {kinds[name].kind}", origin, hint)


def read_resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a resolved config in today's form; features that its version did not have are off."""
    tree = read_old(tree)
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("mixers"), dict):
        return tree
    mixers = {name: _as_printed(entry) for name, entry in model["mixers"].items()}
    return tree | {"model": model | {"mixers": mixers}}


def _as_printed(mixer: Any) -> Any:
    """Return a mixer's entry, whose writes stay as they are where nothing is said of them."""
    if not isinstance(mixer, dict) or mixer.get("kind") != "self_modifying":
        return mixer
    return {"normalize_writes": False} | mixer


def read_old(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a resolved config as they are written now, where it is of an earlier version."""
    log = tree.get("log")
    if isinstance(log, dict) and "tensorboard" in log:
        kept = {key: value for key, value in log.items() if key != "tensorboard"}
        tree = tree | {"log": kept | {"trackers": ["tensorboard"] if log["tensorboard"] else []}}
    model = tree.get("model")
    if not isinstance(model, dict) or not {"mixer", *OLD_NAMES} <= model.keys():
        return tree
    settings = {kind: dict(model.get(kind) or {}) for kind in OLD_NAMES}
    within = settings["attention"].pop("within_documents", False) and model["mixer"] == "attention"
    kind = model["mixer"]
    kept = {key: value for key, value in model.items() if key not in ("mixer", *OLD_NAMES)}
    mixers = {OLD_NAMES.get(kind, "mixer"): _as_printed({"kind": kind, **settings.get(kind, {})})}
    return tree | {"model": kept | {"mixers": mixers, "pattern": [], "within_documents": within}}
