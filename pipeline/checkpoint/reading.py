"""What transformers makes of a checkpoint's tensors: which become parts of the model, and whether embedding and head are one.

Its own functions decide, on names and shapes alone; every stage goes by this one reading.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.files import JsonObject
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

log = logging.getLogger("edgepress")
_NAMED = 3  # unused tensors that a line of the log names


@dataclass(frozen=True)
class Reading:
    """A config and weights as transformers takes them together.

    config: with ``tie_word_embeddings`` off where the files hold two different matrices. weights: without the unused.
    unused: stored tensors of which the model makes nothing. untied: whether the config says tied and the files differ.
    """

    config: PreTrainedConfig
    weights: Weights
    unused: tuple[str, ...] = ()
    untied: bool = False

    def facts(self, stage: str) -> JsonObject:
        """What is worth a line: logged, and returned for the manifest."""
        facts: JsonObject = {}
        if self.unused:
            listed, more = ", ".join(self.unused[:_NAMED]), len(self.unused) - _NAMED
            log.info(
                "%s: the model that config.json describes does not use %s%s", stage, listed, f" and {more} more" if more > 0 else ""
            )
            facts["unused_tensors"] = list(self.unused)
        if self.untied:
            why = "config.json ties the head to the embedding, and the weights hold two; both are kept, as transformers does"
            log.info("%s: %s", stage, why)
            facts["untied_head"] = True
        return facts


def read_together(config: PreTrainedConfig, weights: Weights, model: PreTrainedModel) -> Reading:
    """The reading of a config and all weights of its folder. model: the module tree of the config, on the meta device.

    config is changed where the files decide otherwise.
    """
    tied: dict[str, str] = dict(model.all_tied_weights_keys or {})
    stored = weights.stored
    if weights.leaves_head_float:  # a packed matrix under a tied head's name is nothing that transformers looks for
        weights = weights.without({name for name in tied if name.removesuffix(".weight") in weights.matrices})
    became = targets(weights.names, model)
    untied = [target for target, source in tied.items() if _differ(weights, became, target, source)]
    if untied:
        config.tie_word_embeddings = False
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    nothing = {name for name, target in became.items() if target is None}
    used = weights.without(nothing, {name for name, target in became.items() if target in parameters})
    return Reading(config, used, tuple(sorted(stored - used.stored)), bool(untied))


def targets(names: Iterable[str], model: PreTrainedModel) -> dict[str, str | None]:
    """Stored name -> the tensor of the model that it becomes, or a part of; None for one that is not used.

    As ``convert_and_load_state_dict_in_model`` of transformers decides: known renamings, experts that are merged, and base
    models saved without their prefix.
    """
    state, prefix, mapping = model.state_dict(), model.base_model_prefix, get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    became: dict[str, str | None] = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # renamed where it should not have been
            renamed, _ = rename_source_key(name, [], [], prefix, state)
        became[name] = renamed if renamed in state else None
    return became


def _differ(weights: Weights, became: dict[str, str | None], *pair: str) -> bool:
    """Whether two tensors of the model are both in the files, with different values."""
    stored = [next((name for name, target in became.items() if target == wanted), None) for wanted in pair]
    one, other = stored
    if one is None or other is None:
        return False
    return weights.shape(one) != weights.shape(other) or not torch.equal(weights.tensor(one), weights.tensor(other))
