"""Transformers' common tests of models, generation and configurations, on the stock classes and on ours.

They are run from the source of the installed version: unpack what ``pip download --no-deps --no-binary :all:
transformers==VERSION`` brings, or a checkout of that version, which holds the tests of generation too, beside this
project, or name its folder in ``TRANSFORMERS_SOURCE``.
"""

import unittest
from fnmatch import filter as fnmatch_filter
from fnmatch import fnmatch
from typing import Any

import pytest
import transformers
from upstream_cases import SUITES, ModelTester, Suite, has_checkout, more_labels, source, upstream

if source() is None:
    pytest.skip(
        f"no source of transformers {transformers.__version__} beside the project or in TRANSFORMERS_SOURCE",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

# Why checks do not apply, with the suites and the checks as patterns. What is waived for stock classes, too, is skipped
# or written anew by the file that Transformers has for the family.
_EMBEDDING, _HEADS, _VISION = ("*-embedding", "*-all"), ("*-heads", "*-all"), ("*Net", "VGG")
WAIVED = {
    "asks for torch's own class of an embedding": (_EMBEDDING, ("test_model_get_set_embeddings",)),
    "only a dense embedding is resized, and the error says so": (_EMBEDDING, ("test_resize_*embeddings*",)),
    "expects keys and values of hidden_size / heads in a cache, and cut heads are narrower": (
        _HEADS,
        (
            "test_*_generate_dict_outputs_use_cache",
            "test_past_key_values_format",
            "test_generate_with_static_cache",
            "test_generate_from_inputs_embeds_with_static_cache",
        ),
    ),
    "loads a file without any of the model's parameters, which is refused": (
        ("*-[!s]*",),
        ("test_model_weights_reload_no_missing_tied_weights",),
    ),
    "makes a vocabulary of fewer words than the rank": (_EMBEDDING, ("test_load_with_mismatched_shapes",)),
    "looks at the bases of the class itself, which here is a subclass": (
        ("*-[!s]*",),
        ("test_inherits_generation_mixin",),
    ),
    "the loss of GPT2DoubleHeadsModel leaves out one of its heads": (
        ("GPT2-*",),
        ("test_training_gradient_checkpointing*",),
    ),
    "counts layers of tokens; see test_vision_models.py": (_VISION, ("test_hidden_states_output",)),
    "there is no embedding of words": (_VISION, ("test_model_get_set_embeddings",)),
}


def _test_case(name: str, suite: Suite) -> type[unittest.TestCase]:
    """Transformers' common tests as a class for a suite."""
    bases = [upstream("test_modeling_common", "ModelTesterMixin")]
    if any(model.can_generate() for model in suite.classes):
        bases.append(upstream("generation.test_utils", "GenerationTesterMixin"))

    class Tests(*bases, unittest.TestCase):
        all_model_classes = suite.classes

        def setUp(self) -> None:
            self.model_tester = ModelTester(suite)

        def _prepare_for_class(
            self, inputs: dict[str, Any], model: type, return_labels: bool = False
        ) -> dict[str, Any]:
            inputs = super()._prepare_for_class(inputs, model, return_labels=return_labels)
            return inputs | more_labels(model.__name__, inputs) if return_labels else inputs

        def test_config(self) -> None:
            if not has_checkout():
                self.skipTest("the source on PyPI lacks what its tests of configurations import")
            is_text = suite.classes[0].main_input_name == "input_ids"
            facts = {"has_text_modality": is_text, "common_properties": None if is_text else ["num_channels"]}
            tester = upstream("test_configuration_common", "ConfigTester")
            tester(self, config_class=suite.classes[0].config_class, **facts, **suite.fields).run_common_tests()

    members: dict[str, Any] = {"__module__": __name__, **suite.facts}
    for reason, (suites, checks) in WAIVED.items():
        if any(fnmatch(name, pattern) for pattern in suites):
            waived = {check for pattern in checks for check in fnmatch_filter(dir(Tests), pattern)}
            members |= dict.fromkeys(waived, unittest.skip(reason)(lambda self: None))
    return type(name, (Tests,), members)


for _name, _suite in SUITES.items():
    globals()[_name] = _test_case(_name, _suite)
