"""Tensor names as tables show them: kinds, stacks of layers, number order."""

from tailorcli.display.names import by_kind, by_layer, place_of, short_names


def kinds(names, vectors=()):
    groups = by_kind(names, lambda name: name, lambda name: name in vectors)
    return {kind: len(group) for kind, group in groups.items()}


def layers(names, most=None):
    return {label: len(group) for label, group in by_layer(names, lambda name: name, most).items()}


def llama(count, prefix="model."):
    parts = ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    inside = [f"{prefix}layers.{i}.{part}.weight" for i in range(count) for part in parts]
    return [f"{prefix}embed_tokens.weight", *inside, "lm_head.weight"]


def test_layers_come_in_number_order_without_their_common_start():
    shown = list(short_names(sorted(llama(11))).values())
    assert [name for name in shown if name.endswith("q_proj")] == [f"{i}.self_attn.q_proj" for i in range(11)]
    assert {"lm_head", "model.embed_tokens"} <= set(shown)


def test_kinds_are_called_by_their_last_words():
    assert kinds(llama(3), [n for n in llama(3) if "norm" in n]) == {
        "lm_head": 1,
        "embed_tokens": 1,
        "down_proj": 3,
        "q_proj": 3,
        "norms": 3,
    }
    gpt = [f"h.{i}.{part}.c_proj.{what}" for i in range(2) for part in ("attn", "mlp") for what in ("weight", "bias")]
    assert kinds(gpt, [n for n in gpt if n.endswith("bias")]) == {"attn.c_proj": 2, "mlp.c_proj": 2, "biases": 4}


def test_experts_of_a_layer_are_one_kind():
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in range(4)]
    names += [f"model.layers.{i}.mlp.shared_expert.up_proj.weight" for i in range(2)]
    assert kinds(names) == {"experts.*.up_proj": 8, "shared_expert.up_proj": 2}


def test_a_vision_tower_and_a_decoder_have_layers_of_their_own():
    tower = [f"model.vision_tower.encoder.layers.{i}.q_proj.weight" for i in range(2)]
    decoder = [f"model.language_model.layers.{i}.q_proj.weight" for i in range(3)]
    assert layers([*tower, *decoder, "model.projector.weight"]) == {
        "language_model 0": 1,
        "language_model 1": 1,
        "language_model 2": 1,
        "vision_tower 0": 1,
        "vision_tower 1": 1,
        "other": 1,
    }
    assert kinds([*tower, *decoder]) == {"language_model q_proj": 3, "vision_tower q_proj": 2}


def test_many_layers_are_runs_of_layers():
    assert list(layers(llama(24), most=8)) == [*(f"{n}-{n + 2}" for n in range(0, 24, 3)), "other"]
    assert list(layers(llama(8), most=8)) == [*map(str, range(8)), "other"]
    assert list(layers(llama(9), most=8)) == ["0-1", "2-3", "4-5", "6-7", "8", "other"]


def test_names_without_layers_have_no_number():
    assert place_of("lm_head.weight").number is None
    assert place_of("model.layers.12.mlp.up.weight").number == 12
    assert kinds(["a.weight"]) == {"a": 1}
    assert short_names(["a.weight"]) == {"a.weight": "a"}
