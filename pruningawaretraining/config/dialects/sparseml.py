"""SparseML-style recipes, with CAP's modifiers: each pruning modifier becomes a rule, or a phase of one.

Learning rates and epochs are no pruning: :func:`pruningawaretraining.config.recipe.load_recipe` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.base import native, note, note_ignored
from pruningawaretraining.config.dialects.sparseml_criteria import criterion_of, pattern_of
from pruningawaretraining.config.dialects.sparseml_dynamics import dynamic_rule
from pruningawaretraining.config.dialects.sparseml_names import names_of
from pruningawaretraining.config.dialects.sparseml_phases import Piece, nested, rules_of, without_places
from pruningawaretraining.config.dialects.sparseml_recipe import NAMES, Found, is_cap, is_recipe, modifiers_of
from pruningawaretraining.config.dialects.sparseml_unread import tell_of_unread
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import register

ALL, ALL_PRUNABLE = "__ALL__", "__ALL_PRUNABLE__"
SUFFIX = ".weight"
CLASSES = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d")
"""Targets that name a class of layers."""


@register("dialect", "sparseml")
@dataclass(frozen=True)
class SparseMl:
    """Recipes with ``!CAPruningModifier`` and its kin."""

    keys: ClassVar[tuple[str, ...]] = ("modifiers", "pruning_modifiers", "training_modifiers")
    yaml_tags: ClassVar[tuple[str, ...]] = tuple(f"!{name}" for name in NAMES)

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        """A key that ends in "modifiers" with a list or a mapping, at the top or in a stage."""
        return is_recipe(mapping)

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        """A rule for the pruning modifiers that follow each other on the same layers, in the recipe's order.

        Raises:
            ConfigError: an unknown modifier or key, or a value that is not allowed.
        """
        return config_of(modifiers_of(mapping))


def config_of(found: Sequence[Found]) -> PruningConfig:
    """The modifiers of a recipe as a native config."""
    cap = is_cap(found)
    tell_of_unread(found)
    pieces = [piece for one in found for piece in _pieces(one, cap)]
    rules = nested([*_dynamic_rules(found), *rules_of(pieces)])
    rules += _locks([one for one in found if _only_locks(one)], rules)
    names = [names_of(rule, found) for rule in rules]
    if not rules:
        note_ignored("recipe", "no modifier in it prunes: the model stays dense")
        rules = [{"name": "nothing", "enabled": False}]
    for one in found:
        if isinstance(one.modifier, keys.Quantization):
            note_ignored(f"{one.where} ({one.name})", "the loop quantizes; see docs/quantization.md")
    plain = [without_places(rule) for rule in rules]
    return native(plain, names, counts_epochs=True, distillation=_distillation(found))


def _dynamic_rules(found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for one in found:
        if isinstance(one.modifier, (keys.AlternatingPruning, keys.RegrowingPruning)):
            yield dynamic_rule(one, one.modifier, layers_of(one.modifier.params, one))


def _pieces(one: Found, cap: bool) -> Iterator[Piece]:
    """The pieces of a modifier, one for each sparsity; ``cap`` says whether the recipe is for CAP's version."""
    modifier = one.modifier
    if isinstance(modifier, keys.OneShotPruning):
        yield _one_shot_piece(one, modifier)
    if not isinstance(modifier, keys.Pruning):
        return
    start = max(0.0, modifier.start_epoch) + one.offset
    end = max(start, modifier.end_epoch + one.offset) if modifier.end_epoch >= 0 and not one.once else start
    initial: float | str = modifier.init_sparsity if isinstance(modifier.init_sparsity, float) else "present"
    stays = _never_ends(one) and initial != modifier.final_sparsity
    if stays:
        why = f"with end_epoch {modifier.end_epoch:g} the modifier stays at init_sparsity for good, there too"
        note_ignored(one.key("final_sparsity"), f"{why} ({modifier.init_sparsity})")
    elif modifier.end_epoch < 0 and not one.once and "init_sparsity" in modifier.model_fields_set:
        note_ignored(one.key("init_sparsity"), "without end_epoch final_sparsity is reached at once, as in one shot")
    for number, (sparsity, params) in enumerate(_targets(one, modifier)):
        pattern, final = pattern_of(one, modifier, sparsity)
        layers = layers_of(params, one)
        if stays:
            final = initial if isinstance(initial, float) else 0.0
        if final == 0 or layers == []:
            continue
        if isinstance(initial, float) and initial > final:
            note_ignored(one.key("init_sparsity"), f"{initial:g} is above final_sparsity, {final:g}, taken at once")
        yield Piece(
            name=one.where if number == 0 else f"{one.where}.{number}",
            pattern=pattern,
            layers=layers,
            criterion=criterion_of(one, modifier, cap),
            scope=_scope(one, modifier),
            release=not modifier.leave_enabled,
            start=start,
            end=end,
            every=_frequency(modifier, end - start),
            schedule=modifier.inter_func,
            initial=min(initial, final) if isinstance(initial, float) else initial,
            final=final,
        )


def _never_ends(one: Found) -> bool:
    """Whether a modifier says that it has no end: its sparsity then stays where it begins."""
    given = isinstance(one.modifier, keys.Pruning) and "end_epoch" in one.modifier.model_fields_set
    return given and one.modifier.end_epoch < 0 and not one.once


def _only_locks(one: Found) -> bool:
    """Whether a modifier does nothing but keep the zeros that are there."""
    from_param = isinstance(one.modifier, keys.Pruning) and isinstance(one.modifier.init_sparsity, str)
    return isinstance(one.modifier, keys.Constant) or (from_param and _never_ends(one))


def _one_shot_piece(one: Found, modifier: keys.OneShotPruning) -> Piece:
    pattern, final = pattern_of(one, modifier, modifier.sparsity)
    targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets or [ALL]
    types = [name for name in targets if name in CLASSES]
    everything = any(name in (ALL, ALL_PRUNABLE) for name in targets) or bool(types)
    start = max(0.0, modifier.start_epoch) + one.offset
    return Piece(
        name=one.where,
        pattern={**pattern, "types": types} if types else pattern,
        layers=None if everything else [_within(name) for name in targets],
        exclude=[f"?{_within(name)}" for name in modifier.ignore],
        criterion=criterion_of(one, modifier),
        scope="local",
        release=False,
        start=start,
        end=start,
        every=1.0,
        schedule="linear",
        initial=final,
        final=final,
        keep_zeros=modifier.preserve_sparsity_mask,
    )


def _targets(one: Found, modifier: keys.Pruning) -> list[tuple[float | None, keys.Names]]:
    """(sparsity, parameters) of a modifier; None where mask_type says how far."""
    final = modifier.final_sparsity
    if not isinstance(final, dict):
        if not modifier.params:
            note(one.key("params"), f"{modifier.params!r} is every layer that can be pruned, as it is there")
        return [(final, modifier.params or ALL_PRUNABLE)]
    if modifier.params and "params" in modifier.model_fields_set:
        where = one.key("params")
        raise ConfigError(
            f"{where}: {modifier.params!r} stands beside those of {one.key('final_sparsity')}. Allowed: []"
        )
    found: list[tuple[float | None, keys.Names]] = []
    for text, params in final.items():
        try:
            found.append((float(text), params))
        except ValueError as error:
            raise ConfigError(f"{one.key('final_sparsity')}: the key {text!r} is not a number") from error
    return found


def _scope(one: Found, modifier: keys.Pruning) -> str:
    if modifier.fixed_scope:
        if modifier.global_sparsity:
            note_ignored(one.key("global_sparsity"), "the modifier prunes every layer by the same sparsity")
        return modifier.scope
    return modifier.scope if modifier.global_sparsity is None else "global" if modifier.global_sparsity else "local"


EVERY_STEP = 1e-6
"""Epochs between events that lie at every step, however many an epoch has."""


def _frequency(modifier: keys.Pruning, length: float) -> float:
    """Epochs between events: every step where it is -1 or not given."""
    if modifier.update_frequency > 0:
        return modifier.update_frequency
    return EVERY_STEP if length and modifier.init_sparsity != modifier.final_sparsity else 1.0


def layers_of(params: keys.Names, one: Found) -> list[str] | None:
    """Entries of layers from names of parameters; None for all that can be pruned."""
    given = [params] if isinstance(params, str) else params
    if ALL in given and isinstance(one.modifier, keys.Pruning):
        note_ignored(
            f"{one.key('params')} {ALL}", "weights of convolutions and linear layers are pruned; norms and biases stay"
        )
    if any(name in (ALL, ALL_PRUNABLE) for name in given):
        return None
    biases = [name for name in given if not name.startswith("re:") and name.endswith(".bias")]
    for name in biases:
        note_ignored(one.key("params"), f"{name!r} is a bias, and weights are pruned")
    return [_layer(name) for name in given if name not in biases]


def _layer(param: str) -> str:
    """``a.b.weight`` as ``a.b``; a regular expression stays one for names of parameters."""
    return f"param:{param[3:]}" if param.startswith("re:") else param.removesuffix(SUFFIX)


def _within(target: str) -> str:
    return f"in:{target[3:]}" if target.startswith("re:") else target


def _locks(constants: Iterable[Found], rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules that keep zeros, on layers that no other rule masks."""
    taken: list[str] = []
    for rule in rules:
        if rule.get("release"):
            continue
        if rule["layers"] is None:
            for one in constants:
                note_ignored(one.where, f"{rule['name']} keeps its zeros for good")
            return []
        taken += [f"?{entry}" for entry in rule["layers"]]
    found: list[dict[str, Any]] = []
    for one in constants:
        assert isinstance(one.modifier, (keys.Constant, keys.Pruning))
        layers = layers_of(one.modifier.params, one)
        start = max(0.0, one.modifier.start_epoch) + one.offset
        key = {"layers": layers, "exclude": list(dict.fromkeys(taken))}
        if layers == [] or any({name: rule[name] for name in key} == key for rule in found):
            continue
        if taken and layers is not None and set(layers) <= {entry[1:] for entry in taken}:
            note_ignored(one.where, "the modifiers before it keep their zeros for good")
            continue
        lock = {"name": one.where, "pattern": "unstructured", **key, "criterion": "weight", "mode": "lock"}
        released = any(rule.get("release") for rule in rules)
        found.append({**lock, "start": start, "at_init": start == 0, "nested": released})
    return found


def _distillation(found: Iterable[Found]) -> dict[str, Any] | None:
    """The teacher's part: the loss is (1 - hardness) times the task's and hardness times the teacher's."""
    for one in found:
        if not isinstance(one.modifier, keys.Distillation):
            continue
        hardness = one.modifier.hardness
        note_ignored(
            one.key("hardness"),
            f"the loop weighs the loss of the task: {1 - hardness:g} * loss + pruner.distill_loss(outputs, inputs)",
        )
        for key in ("start_epoch", "end_epoch"):
            if getattr(one.modifier, key) > 0:
                note_ignored(one.key(key), "the loop decides in which epochs it adds pruner.distill_loss")
        return {"weight": hardness, "temperature": one.modifier.temperature}
    return None
