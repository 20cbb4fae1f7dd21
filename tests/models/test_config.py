"""Which differences between two configs matter to a forward pass."""

from tailorcli.models.config import differing_fields


def test_what_the_forward_does_is_told_and_nothing_else():
    base = {
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_cache": True,
        "transformers_version": "5.0",
        "dtype": "float32",
        "text_config": {"sliding_window": None, "logit_scale": 1.0, "attention_dropout": 0.0},
        "eos_token_id": 2,
        "quantization_config": {"quant_method": "fp8"},
    }
    tuned = base | {"use_cache": False, "dtype": "bfloat16", "eos_token_id": 7, "transformers_version": "5.1"}
    del tuned["quantization_config"]
    assert differing_fields(base, tuned) == []
    changed = tuned | {
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "yarn", "factor": 4},
        "text_config": {"sliding_window": 64, "logit_scale": 1.0, "attention_dropout": 0.1},
    }
    assert differing_fields(base, changed) == [
        "rms_norm_eps (1e-06, 1e-05)",
        "rope_scaling.factor (not given, 4)",
        "rope_scaling.type (not given, 'yarn')",
        "rope_theta (10000.0, 1000000.0)",
        "text_config.sliding_window (not given, 64)",
    ]
