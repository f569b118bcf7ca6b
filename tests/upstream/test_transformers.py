"""transformers' own common tests, over TokenFormer's classes.

They need a checkout of transformers (``tests/upstream/checkouts.sh FOLDER``), named by ``TRANSFORMERS_CHECKOUT``, and
``pip install httpx parameterized``:

    TRANSFORMERS_CHECKOUT=FOLDER/transformers pytest -n 2 tests/upstream/test_transformers.py
"""

import os
import sys
import unittest

import pytest

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
if CHECKOUT is None:
    pytest.skip("no TRANSFORMERS_CHECKOUT", allow_module_level=True)
sys.path[:0] = [CHECKOUT, os.path.join(CHECKOUT, "utils")]

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from lit_tokenformer.interop import growing_models as growing  # noqa: E402
from lit_tokenformer.interop import modeling_tokenformer as modeling  # noqa: E402
from lit_tokenformer.interop.transformers import to_transformers  # noqa: E402, F401  # registers the classes

for _task, _class in {
    **{"": "Model", "_FOR_CAUSAL_LM": "ForCausalLM", "_FOR_MASKED_LM": "ForMaskedLM"},
    **{"_FOR_QUESTION_ANSWERING": "ForQuestionAnswering", "_FOR_TOKEN_CLASSIFICATION": "ForTokenClassification"},
    "_FOR_SEQUENCE_CLASSIFICATION": "ForSequenceClassification",
    "_FOR_IMAGE_CLASSIFICATION": "ForImageClassification",
}.items():  # where the suite looks up which labels a class needs
    names = getattr(modeling_auto, f"MODEL{_task}_MAPPING_NAMES")
    names.update(tokenformer=f"Tokenformer{_class}", growing_tokenformer=f"GrowingTokenformer{_class}")

modeling_auto.MODEL_MAPPING_NAMES["tokenformer_vision"] = "TokenformerVisionModel"
modeling_auto.MODEL_MAPPING_NAMES["growing_tokenformer_vision"] = "GrowingTokenformerVisionModel"

SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 40, "max_position_embeddings": 512},
}


PATCHES = {"stem": "patch", "head": "image", "positions": "learned"}


class Tester(CausalLMModelTester):
    """Small causal models."""

    base_model_class = modeling.TokenformerModel
    config_class = modeling.TokenformerConfig
    causal_lm_class = modeling.TokenformerForCausalLM
    question_answering_class = modeling.TokenformerForQuestionAnswering
    sequence_classification_class = modeling.TokenformerForSequenceClassification
    token_classification_class = modeling.TokenformerForTokenClassification

    def get_config(self):
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": self.num_labels}
        return self.config_class(**SIZES, **special, tie_word_embeddings=self.tie_word_embeddings)


class CausalTest(CausalLMModelTest, unittest.TestCase):
    """Causal language models and classifiers: common, generation, pipeline and training tests."""

    model_tester_class = Tester


class GrowingTester(Tester):
    """Small causal models with our backbone."""

    base_model_class = growing.GrowingTokenformerModel
    config_class = growing.GrowingTokenformerConfig
    causal_lm_class = growing.GrowingTokenformerForCausalLM
    question_answering_class = growing.GrowingTokenformerForQuestionAnswering
    sequence_classification_class = growing.GrowingTokenformerForSequenceClassification
    token_classification_class = growing.GrowingTokenformerForTokenClassification


class GrowingCausalTest(CausalLMModelTest, unittest.TestCase):
    """Causal language models and classifiers with our backbone."""

    model_tester_class = GrowingTester


class OtherTester:
    """Small masked language models and vision transformers."""

    def __init__(self, parent, config_class, vision):
        self.parent, self.config_class, self.vision, self.is_training = parent, config_class, vision, True
        self.batch_size, self.seq_length, self.hidden_size, self.num_hidden_layers = 3, 17 if vision else 7, 32, 2
        self.num_attention_heads = 2

    def get_config(self):
        parts = {"parts": PATCHES} if self.vision and self.config_class is growing.GrowingTokenformerConfig else {}
        return self.config_class(**SIZES, is_causal=False, image_size=16, patch_size=4, num_labels=3, **parts)

    def prepare_config_and_inputs_for_common(self):
        if self.vision:
            return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 16, 16])}
        return self.get_config(), {"input_ids": ids_tensor([self.batch_size, self.seq_length], 99)}


class MaskedTest(ModelTesterMixin, unittest.TestCase):
    """Masked language models: common tests."""

    all_model_classes = (modeling.TokenformerForMaskedLM,)
    all_generative_model_classes = ()

    def setUp(self):
        self.model_tester = OtherTester(self, modeling.TokenformerConfig, vision=False)
        self.config_tester = ConfigTester(self, config_class=modeling.TokenformerConfig)


class VisionTest(ModelTesterMixin, unittest.TestCase):
    """Vision transformers: common tests."""

    all_model_classes = (modeling.TokenformerVisionModel, modeling.TokenformerForImageClassification)
    all_generative_model_classes = ()
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = OtherTester(self, modeling.TokenformerConfig, vision=True)
        self.config_tester = ConfigTester(self, config_class=modeling.TokenformerConfig, has_text_modality=False)

    @unittest.skip("the input embedding of an image model is a convolution, as in transformers' ViT")
    def test_model_get_set_embeddings(self):
        pass


class GrowingMaskedTest(MaskedTest):
    """Masked language models with our backbone."""

    all_model_classes = (growing.GrowingTokenformerForMaskedLM,)

    def setUp(self):
        self.model_tester = OtherTester(self, growing.GrowingTokenformerConfig, vision=False)
        self.config_tester = ConfigTester(self, config_class=growing.GrowingTokenformerConfig)


class GrowingVisionTest(VisionTest):
    """Vision transformers with our backbone."""

    all_model_classes = (growing.GrowingTokenformerVisionModel, growing.GrowingTokenformerForImageClassification)

    def setUp(self):
        self.model_tester = OtherTester(self, growing.GrowingTokenformerConfig, vision=True)
        self.config_tester = ConfigTester(self, growing.GrowingTokenformerConfig, has_text_modality=False)


del CausalLMModelTest, ModelTesterMixin  # pytest would collect them
