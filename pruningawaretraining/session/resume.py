"""The state of a run beside the weights: written, read, and all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from pruningawaretraining.engine.state import is_whole, load_into, state_of
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.models.hugging_face import follow_configs
from pruningawaretraining.registry import build
from pruningawaretraining.session.session import Session
from pruningawaretraining.session.state import (
    VERSION,
    all_or_nothing,
    check_version,
    plain_or_none,
    rng_state,
    set_rng_state,
)

logger = logging.getLogger(__name__)


def session_state(session: Session) -> dict[str, Any]:
    """See :meth:`pruningawaretraining.Pruning.state_dict`."""
    return {
        "version": VERSION,
        "config": session.config.model_dump(mode="json"),
        "steps": session.steps.count,
        "ended": session.ended,
        "counted": session.epochs.counted,
        **state_of(session.engine),
        "inputs": plain_or_none(session.inputs) if session.capture.captured else None,
        "distillation": None if session.distiller is None else session.distiller.state_dict(),
        "rng": rng_state(),
    }


def load_session(session: Session, state: Mapping[str, Any], generators: bool = False) -> None:
    """See :meth:`pruningawaretraining.Pruning.load_state_dict`."""
    check_version(state)
    _check_patterns(session, state.get("config"))
    with all_or_nothing([session.model, *session.followers]) as undo:
        _warn_of_another_config(session, state.get("config"))
        steps, ended = _whole(state, "steps"), state["ended"]
        if not isinstance(ended, bool):
            raise CheckpointError(f"state: ended: {ended!r} is not true or false")
        counted = state.get("counted", False)
        if not isinstance(counted, bool):
            raise CheckpointError(f"state: counted: {counted!r} is not true or false")
        if session.inputs is None and state["inputs"] is not None:
            session.capture.set(state["inputs"])
        if state["channels"] is not None:
            _find_coupled(session)
        removed = load_into(session.engine, state, session.context(), undo)
        if session.distiller is not None and state.get("distillation") is not None:
            undo.append(partial(session.distiller.load_state_dict, session.distiller.state_dict()))
            session.distiller.load_state_dict(state["distillation"])
        if generators:
            set_rng_state(state["rng"])
    if removed:
        follow_configs(session.model, session.rules.are_uniform)
    session.steps.count, session.ended = steps, ended
    session.epochs.counted = counted
    session.begun = session.begun or steps > 0
    _follow_targets(session, state.get("config"))
    if removed:
        session.follow_removal()


def _whole(state: Mapping[str, Any], key: str) -> int:
    value = state[key]
    if not is_whole(value):
        raise CheckpointError(f"state: {key}: {str(value)[:80]} is not a whole number of 0 or more")
    return int(value)


def _find_coupled(session: Session) -> None:
    """The groups of the dense model; of a model for inference too, for the architecture: nothing acts on them."""
    known = session.engine.coupled is not None or session.inputs is None
    if session.config.infer and session.rules.coupled and not known:
        session.engine.coupled = session.trace()
    else:
        _ = session.coupled


def _check_patterns(session: Session, before: Any) -> None:
    """Refuse the state of rules with other patterns: their masks are of other groups.

    Raises:
        CheckpointError: it names the rule and both patterns.
    """
    rules = before.get("rules") if isinstance(before, Mapping) else None
    if not isinstance(rules, list):
        return
    for number, (mine, saved) in enumerate(zip(session.config.rules, rules, strict=False)):
        theirs = saved.get("pattern") if isinstance(saved, Mapping) else None
        if theirs is not None and theirs != mine.pattern and _built(theirs) != build("pattern", mine.pattern):
            raise CheckpointError(
                f"state: rules[{number}] had the pattern {theirs!r} and has {mine.pattern!r}. Allowed: the same pattern"
            )


def _built(pattern: Any) -> Any:
    try:
        return build("pattern", pattern)
    except (ConfigError, TypeError):
        return None


def _warn_of_another_config(session: Session, before: Any) -> None:
    """Rules may be changed between runs, but not by mistake."""
    now = session.config.model_dump(mode="json")
    for number, (mine, saved) in enumerate(zip(now["rules"], (before or now)["rules"], strict=False)):
        different = [
            f"{key} was {_shown(saved[key])} and is {_shown(mine[key])}"
            for key in mine
            if key != "target" and saved.get(key, mine[key]) != mine[key]
        ]
        if different:
            logger.warning("state: it was saved with another rules[%d]: %s", number, "; ".join(different))


def _shown(value: Any) -> str:
    """A value of a config, without what is left to its defaults."""
    named = {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value
    return repr(named)


def _follow_targets(session: Session, before: Any) -> None:
    """Say which target goes on where a state was saved with another one than the config's; remember those that a rule
    that is over was not pruned towards, so that records do not take them for met."""
    now, unmet = session.config.model_dump(mode="json"), set()
    phases = {one.key: one.phase for one in session.engine.rules}
    for number, (mine, saved) in enumerate(zip(now["rules"], (before or now)["rules"], strict=False)):
        key, old, new = f"rules[{number}]", saved.get("target", mine["target"]), mine["target"]
        if old == new or key not in phases:
            continue
        if phases[key] in ("finetune", "done"):
            unmet.add(key)
            logger.warning(
                "state: %s had met its target of %s when it was saved, and stays there: nothing is pruned towards %s. "
                "To do that: save_pruned(model, path), then Pruning(load_pruned(build_model(), path), config, ...)",
                *(key, _given(old, new), _given(new, old)),
            )
        else:
            logger.warning(
                "state: %s goes on to the new target of %s in place of %s. For the old one: the config that the state "
                "was saved with",
                *(key, _given(new, old), _given(old, new)),
            )
    session.unmet = frozenset(unmet)


def _given(target: Any, other: Any) -> str:
    """The parts of a target that are given, or differ from another's."""
    if not isinstance(target, dict) or not isinstance(other, dict):
        return repr(target)
    parts = [f"{key} {one!r}" for key, one in target.items() if one is not None and one != other.get(key)]
    return ", ".join(parts) or _shown(target)
