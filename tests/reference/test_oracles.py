"""The oracles and the random files agree with themselves, with each other and with the `gguf` package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.reference.dflash import DraftReference, speculative_reference
from tests.reference.qwen35 import Reference, delta_rule, greedy, rope, round_trip
from tests.reference.qwen35moe import MoEReference, route
from tests.tiny import GEOMETRIES, K_QUANT_GEOMETRIES, MOE_GEOMETRIES, WEIGHT_TYPES, write_draft, write_target
from tools.synth.__main__ import main as synth
from tools.synth.blocks import TYPES, Pool, next_prime, random_blocks
from tools.synth.vocabulary import build_vocabulary

PROMPT = [17, 4, 255, 90, 3, 3, 120, 61, 8, 200, 33]
TARGETS = GEOMETRIES | MOE_GEOMETRIES
EXACT = 1e-9  # double precision: what remains is the order of sums, about 1e-13 for logits of size 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for name, geometry in TARGETS.items():
        write_target(folder / f"{name}.gguf", geometry)
    return folder


def reference(files: Path, name: str) -> Reference:
    return (MoEReference if name in MOE_GEOMETRIES else Reference)(files / f"{name}.gguf")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("split", [[1] * len(PROMPT), [4, 7], [2, 1, 8]])
def test_any_split_of_the_tokens_gives_the_same_logits_and_state(files: Path, name: str, split: list[int]) -> None:
    whole, parts = reference(files, name), reference(files, name)
    expected = whole.forward(PROMPT)
    ends = np.cumsum(split)
    actual = np.concatenate([parts.forward(PROMPT[end - n : end]) for n, end in zip(split, ends)])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=EXACT)
    for a, b in zip(parts.state(), whole.state()):
        assert a.keys() == b.keys()
        for part in a:
            np.testing.assert_allclose(a[part], b[part], rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", TARGETS)
def test_logits_depend_on_every_earlier_token_and_on_no_later_one(files: Path, name: str) -> None:
    model = reference(files, name)
    base = model.forward(PROMPT)
    for changed in (0, 5, 9):
        model.reset()
        tokens = [*PROMPT[:changed], PROMPT[changed] + 1, *PROMPT[changed + 1 :]]
        logits = model.forward(tokens)
        np.testing.assert_array_equal(logits[:changed], base[:changed])
        assert np.abs(logits[changed] - base[changed]).max() > 1e-3
        if name != "all_recurrent":  # a convolution and a decaying state may forget a token to the last digit
            assert np.abs(logits[-1] - base[-1]).max() > 1e-6


def test_a_loaded_state_continues_where_it_was_taken(files: Path) -> None:
    model = reference(files, "ratio3")
    model.forward(PROMPT[:6])
    state = model.state()
    expected = model.forward(PROMPT[6:])
    model.forward(PROMPT)
    model.load_state(state, 6)
    np.testing.assert_array_equal(model.forward(PROMPT[6:]), expected)


def test_logits_are_spread_and_generation_is_not_stuck(files: Path) -> None:
    for name in TARGETS:
        model = reference(files, name)
        assert 1 < model.forward(PROMPT).std() < 20, name
        assert len(set(greedy(model, PROMPT, 24))) > 4, name


def test_delta_rule_stores_and_recalls_a_value() -> None:
    state = np.zeros((4, 3))
    key, value = np.array([0.0, 1, 0, 0]), np.array([1.0, 2, 3])
    np.testing.assert_allclose(delta_rule(state, key, key, value, 1.0, 0.0), value)
    np.testing.assert_allclose(delta_rule(state, key, key, 2 * value, 1.0, -0.5), 2 * value)  # replaced, not added
    other = np.array([1.0, 0, 0, 0])
    np.testing.assert_allclose(delta_rule(state, key, other, value, 0.0, np.log(0.5)), value)  # beta 0: only decay


def test_rope_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 64))
    base = 2.0**16  # whose frequencies are powers of two, so that no angle is rounded
    scores = [
        float(np.sum(rope(q, np.array([p + 5]), 32, base) * rope(k, np.array([p]), 32, base))) for p in (0, 3, 1000)
    ]
    np.testing.assert_allclose(scores, scores[0], atol=1e-10)
    np.testing.assert_array_equal(rope(q, np.array([7]), 32, base)[..., 32:], q[..., 32:])


def test_rope_rounds_frequencies_and_angles_to_float32() -> None:
    x = np.array([[[1.0, 1.0, 0.0, 0.0]]])  # pairs (0, 2) and (1, 3) at angle 0: their cosines and sines come out
    frequency = np.float32(1e7**-0.5)
    angle = float(np.float32(262_143) * frequency)
    assert abs(angle - 262_143 * 1e7**-0.5) > 1e-6
    wanted = [np.cos(262_143.0), np.cos(angle), np.sin(262_143.0), np.sin(angle)]
    np.testing.assert_array_equal(rope(x, np.array([262_143]), 4, 1e7)[0, 0], wanted)


def test_a_skipped_prediction_block_changes_nothing(files: Path, tmp_path: Path) -> None:
    plain = write_target(tmp_path / "plain.gguf", dataclasses.replace(GEOMETRIES["mtp"], nextn=0))
    np.testing.assert_array_equal(reference(files, "mtp").forward(PROMPT), Reference(plain).forward(PROMPT))


@pytest.mark.parametrize("types", WEIGHT_TYPES)
def test_every_weight_type_loads_with_the_asked_type_and_spread(tmp_path: Path, types: str) -> None:
    path = write_target(tmp_path / "target.gguf", GEOMETRIES["ratio3"], types)
    found = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    kinds = {t.tensor_type.name.lower() for t in found.values()}
    assert kinds == ({"f32", "q4_k", "q5_k", "q6_k"} if types == "q4_k_m" else {"f32", types})
    assert found["blk.0.ssm_conv1d.weight"].tensor_type.name == "F32"
    up = found["blk.1.ffn_up.weight"]
    values = gguf.dequantize(up.data, up.tensor_type)
    assert values.shape == (512, 256)
    # 131,072 values: the estimate of the spread is good to 1 %, a wrong scale or offset is not.
    assert values.std() * 16 == pytest.approx(1, rel=0.04)
    assert abs(values.mean()) < 0.002
    assert np.isfinite(Reference(path).forward(PROMPT)).all()


def test_a_row_s_experts_are_the_most_likely_and_their_weights_sum_to_one() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.05, 0.2, 0.45]))
    chosen, weights = route(logits, 3)
    assert chosen.tolist() == [4, 1, 3]  # of equal ones, the first
    np.testing.assert_allclose(weights, np.array([0.45, 0.2, 0.2]) / 0.85)
    np.testing.assert_allclose(route(logits + 5, 5)[1].sum(), 1)


@pytest.mark.parametrize("types", ["f32", "q8_0", "q4_k_m"])
def test_experts_load_with_the_asked_type_and_the_router_as_f32(tmp_path: Path, types: str) -> None:
    path = write_target(tmp_path / "target.gguf", MOE_GEOMETRIES["moe"], types)
    found = {t.name.removeprefix("blk.3."): t for t in gguf.GGUFReader(str(path)).tensors}
    wanted = {"f32": ("F32", "F32"), "q8_0": ("Q8_0", "Q8_0"), "q4_k_m": ("Q4_K", "Q6_K")}[types]
    for names, kind in (
        (("ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp"), wanted[0]),
        (("ffn_down_exps", "ffn_down_shexp"), wanted[1]),  # the last layer gets more bits
        (("ffn_gate_inp", "ffn_gate_inp_shexp"), "F32"),
    ):
        assert {found[f"{name}.weight"].tensor_type.name for name in names} == {kind}
    gate = found["ffn_gate_exps.weight"]
    values = gguf.dequantize(gate.data, gate.tensor_type)
    assert values.shape == (8, 256, 256)
    assert values.std() * 16 == pytest.approx(1, rel=0.04)
    assert np.isfinite(MoEReference(path).forward(PROMPT)).all()


def test_rounded_weights_are_the_same_weights(tmp_path: Path) -> None:
    logits = {
        types: Reference(write_target(tmp_path / f"{types}.gguf", GEOMETRIES["ratio3"], types)).forward(PROMPT)
        for types in ("f32", "f16", "bf16", "q8_0", "q4_0")
    }
    error = {types: np.abs(values - logits["f32"]).mean() for types, values in logits.items()}
    assert 0 < error["f16"] < error["bf16"] < error["q8_0"] * 2 < error["q4_0"] < 4


@pytest.mark.parametrize("name", ["equal", "odd"])
def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path: Path, name: str) -> None:
    assert name not in K_QUANT_GEOMETRIES
    with pytest.raises(ValueError, match="not a multiple of the 256"):
        write_target(tmp_path / "target.gguf", GEOMETRIES[name], "q4_k")


def test_outliers_leave_exact_attention_alone_and_spoil_a_q4_0_cache(tmp_path: Path) -> None:
    damage = {}
    for outliers in (None, 32.0):
        path = write_target(tmp_path / f"{outliers}.gguf", GEOMETRIES["gqa6"], outliers=outliers)
        exact = Reference(path).forward(PROMPT)
        lossy = Reference(path, cache_k=round_trip("q4_0")).forward(PROMPT)
        damage[outliers] = (exact, np.abs(lossy - exact).mean())
    np.testing.assert_allclose(damage[32.0][0], damage[None][0], rtol=0, atol=1e-4)  # the factors are float32
    assert damage[32.0][1] > 2 * damage[None][1] > 0


DRAFTS = {
    "full": {"layers": 2},
    "sliding": {"layers": 3, "window": 6},
    "sliding_bidirectional": {"layers": 3, "window": 6, "causal": False},
    "all_causal": {"layers": 2, "window": 4, "causal": True},
    "fork": {"layers": 3, "window": 6, "layout": "fork", "taps": (2, 0)},
}


def features_of(model: Reference, draft: DraftReference, tokens: list[int]) -> np.ndarray:
    model.reset()
    model.forward(tokens)
    return draft.features(model.hidden)


@pytest.fixture(scope="module")
def drafts(files: Path) -> dict[str, DraftReference]:
    target = GEOMETRIES["ratio3"]
    return {
        name: DraftReference(write_draft(files / f"draft-{name}.gguf", target, **options), files / "ratio3.gguf")
        for name, options in DRAFTS.items()
    }


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("split", [[11], [1] * 11, [4, 7], [10, 1]])
def test_context_kept_as_keys_and_values_equals_recomputing_it(
    files: Path, drafts: dict[str, DraftReference], name: str, split: list[int]
) -> None:
    draft = drafts[name]
    features = features_of(reference(files, "ratio3"), draft, PROMPT)
    pieces = []
    for n, end in zip(split, np.cumsum(split)):
        pieces.append(draft.context_kv(features[end - n : end], first=int(end - n)))
    context = [
        tuple(np.concatenate([piece[layer][part] for piece in pieces]) for part in (0, 1))
        for layer in range(draft.layers)
    ]
    cached = draft.propose_from(context, 42, len(PROMPT), 8)
    np.testing.assert_allclose(cached, draft.propose_logits(features, 42, len(PROMPT), 8), rtol=0, atol=EXACT)


def test_masks_follow_the_rule_of_each_layer(drafts: dict[str, DraftReference]) -> None:
    query, key = np.arange(11, 19)[:, None], np.arange(19)
    distance = query - key
    causal, both = (distance >= 0) & (distance < 6), np.abs(distance) < 6
    everything = np.ones_like(both)
    for name, expected in {
        "full": [everything, everything],
        "sliding": [causal, causal, everything],
        "sliding_bidirectional": [both, both, everything],
        "all_causal": [(distance >= 0) & (distance < 4), distance >= 0],
        "fork": [causal, causal, everything],
    }.items():
        for layer, mask in enumerate(expected):
            np.testing.assert_array_equal(drafts[name].visible(layer, 11, 8), mask, err_msg=f"{name}, layer {layer}")


def test_the_causal_argument_wins_over_the_file(files: Path, drafts: dict[str, DraftReference]) -> None:
    drafts_ = {
        causal: DraftReference(files / "draft-sliding.gguf", files / "ratio3.gguf", causal=causal)
        for causal in (None, True, False)
    }
    assert [draft.causal for draft in drafts_.values()] == [[True, True, False], [True] * 3, [False] * 3]
    features = features_of(reference(files, "ratio3"), drafts_[None], PROMPT)
    a, b, c = (draft.propose_logits(features, 42, len(PROMPT), 8) for draft in drafts_.values())
    assert np.abs(a - b).max() > 1e-3
    assert np.abs(a - c).max() > 1e-3


def test_both_layouts_of_a_draft_give_the_same_proposals(files: Path, tmp_path: Path) -> None:
    target = GEOMETRIES["ratio3"]
    logits = []
    for layout in ("llama.cpp", "fork"):
        path = write_draft(tmp_path / f"{layout}.gguf", target, window=6, taps=(0, 2), layout=layout)
        draft = DraftReference(path, files / "ratio3.gguf")
        assert draft.taps == [0, 2]
        assert draft.block_size == 16
        draft.fc = np.eye(*draft.fc.shape)  # its name differs, and with it its random values
        draft.hidden_norm = np.ones_like(draft.hidden_norm)
        features = features_of(reference(files, "ratio3"), draft, PROMPT)
        logits.append(draft.propose_logits(features, 42, len(PROMPT), 16))
    np.testing.assert_array_equal(*logits)


def test_sliding_layers_forget_what_left_the_window(files: Path, tmp_path: Path) -> None:
    path = write_draft(tmp_path / "draft.gguf", GEOMETRIES["ratio3"], layers=1, window=6, sliding=[True])
    draft = DraftReference(path, files / "ratio3.gguf")
    features = features_of(reference(files, "ratio3"), draft, PROMPT)
    base = draft.propose_logits(features, 42, 11, 4)
    for position, rows_that_see_it in ((5, 0), (6, 1), (10, 4)):
        changed = features.copy()
        changed[position] += 1
        difference = np.abs(draft.propose_logits(changed, 42, 11, 4) - base).max(axis=1)
        assert (difference > 1e-6).sum() == rows_that_see_it, position


def test_a_context_of_the_wrong_length_is_refused(files: Path, drafts: dict[str, DraftReference]) -> None:
    features = features_of(reference(files, "ratio3"), drafts["full"], PROMPT)
    with pytest.raises(ValueError, match="11 rows, but the anchor stands at position 10"):
        drafts["full"].propose_logits(features, 42, 10, 8)


class Oracle:
    """A scripted draft: right for `right(step)` tokens of each block, wrong from there on."""

    def __init__(self, prompt: list[int], answer: list[int], vocab: int, right: int) -> None:
        self._text, self._vocab, self._right = [*prompt, *answer], vocab, right

    def features(self, hidden: dict[int, np.ndarray]) -> np.ndarray:
        return hidden[0][:, :1]

    def propose_logits(self, features: np.ndarray, anchor_token: int, start: int, rows: int) -> np.ndarray:
        assert len(features) == start
        assert self._text[start] == anchor_token
        logits = np.zeros((rows, self._vocab))
        for i in range(1, rows):
            wrong = int(i > self._right)
            logits[i, (self._text[start + i] + wrong) % self._vocab] = 1
        return logits


@pytest.mark.parametrize(("right", "length"), [(0, 1), (2, 3), (7, 8), (100, 8)])
def test_scripted_drafts_give_greedy_tokens_and_the_expected_lengths(files: Path, right: int, length: int) -> None:
    model = reference(files, "ratio3")
    answer = greedy(model, PROMPT, 40)
    draft = Oracle(PROMPT, answer, 384, right)
    tokens, lengths = speculative_reference(model, draft, PROMPT, 25, block=8)
    assert tokens == answer[:25]
    assert lengths == [length] * -(-24 // length)


@pytest.mark.parametrize("name", DRAFTS)
def test_random_drafts_give_greedy_tokens(files: Path, drafts: dict[str, DraftReference], name: str) -> None:
    model = reference(files, "ratio3")
    expected = greedy(model, PROMPT, 12)
    tokens, lengths = speculative_reference(model, drafts[name], PROMPT, 12, block=6)
    assert tokens == expected
    assert sum(lengths) >= 11
    assert min(lengths) >= 1


def test_vocabularies_are_well_formed() -> None:
    for size in (320, 512, 65_536, 248_320):
        vocabulary = build_vocabulary(size)
        assert len(vocabulary.tokens) == len(vocabulary.types) == len(set(vocabulary.tokens)) == size
        known = set(vocabulary.tokens[:256])
        for merge, token in zip(vocabulary.merges, vocabulary.tokens[256:]):
            left, right = merge.split(" ")
            assert left in known
            assert right in known
            assert token == left + right
            known.add(token)
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    assert (ids["<|endoftext|>"], ids["<|im_end|>"], ids["<think>"]) == (248_044, 248_046, 248_068)
    assert vocabulary.mask_token_id == 248_070
    with pytest.raises(ValueError, match="200 were asked for"):
        build_vocabulary(200)


def test_no_two_rows_of_a_pooled_tensor_are_equal() -> None:
    pool = Pool("q4_k", 0.02, np.random.default_rng(0), nbytes=1 << 20)
    data = b"".join(pool.cut((6000, 1024), offset=123))
    rows = {data[i : i + 576] for i in range(0, len(data), 576)}
    assert len(data) == 6000 * 576
    assert len(rows) == 6000
    assert [next_prime(n) for n in (8, 11, 90)] == [11, 11, 97]


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "q5_k", "q6_k", "f16", "bf16", "f32"])
def test_random_blocks_have_the_asked_mean_and_spread(name: str) -> None:
    kind = gguf.GGMLQuantizationType(TYPES[name].code)
    assert gguf.GGML_QUANT_SIZES[kind] == (TYPES[name].size, TYPES[name].nbytes)
    count = (1 << 18) // TYPES[name].size
    blocks = random_blocks(name, count, 0.02, np.random.default_rng(1))
    values = gguf.dequantize(blocks.reshape(count, -1), kind).reshape(-1)
    assert values.size == 1 << 18
    assert values.std() == pytest.approx(0.02, rel=0.02)  # 262,144 values in as few as 1,024 blocks
    assert abs(values.mean()) < 0.0005


@pytest.mark.parametrize("command", [["target", "--mix", "q4_k_m"], ["target", "--mix", "q8_0"], ["draft"]])
def test_synthetic_files_read_back_with_the_gguf_package(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "out.gguf"
    synth([command[0], str(path), "--geometry", "tiny,layers=4", *command[1:]])
    reader = gguf.GGUFReader(str(path))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    arch = keys["general.architecture"]
    assert keys[f"{arch}.embedding_length"] == 256
    assert len(keys["tokenizer.ggml.tokens"]) == 512
    assert path.stat().st_size == max(t.data_offset + t.n_bytes + -t.n_bytes % 32 for t in reader.tensors)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        assert values.std() > 0, tensor.name
    if command[0] == "target":
        assert np.isfinite(Reference(path).forward(PROMPT)).all()
        assert keys["qwen35.rope.dimension_sections"] == [11, 11, 10, 0]
    else:
        assert keys["dflash.target_layers"] == [2, 2, 2, 2, 2]
