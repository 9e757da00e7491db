"""What the entry point `lmms_eval.models` names: makes `lmms-eval --model dreamllm` work."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="dreamllm", simple_class_path="dreamllm.evaluation.harness.lmms_eval_model.DreamLLMForLmmsEval"
)
