"""Every misuse of a session is an error that says what was asked, found and what to do, and changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pydflash.config import EngineConfig
from pydflash.drafts import load_draft
from pydflash.engine import Engine
from pydflash.errors import (
    ConfigError,
    ContextFull,
    ContextWarning,
    NothingPending,
    OutOfMemory,
    PydflashError,
    SessionClosed,
    ShapeError,
    StateError,
)  # fmt: skip
from pydflash.ggml_types import GGMLType
from pydflash.kv_format import CACHE_TYPES
from pydflash.limits import TAPE_ROWS
from pydflash.models import Model, load_model
from pydflash.native import Arena, Backend
from pydflash.runtime import DeviceProposal, Session
from pydflash.state import DeltaSpec

Load = Callable[..., Model]


@pytest.fixture
def session(model_of: Load) -> Any:
    with Session(model_of("equal"), 64) as session:
        yield session


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "the input is empty"),
        (np.zeros((2, 2), np.int32), "shape"),
        ([0.5, 1.0], r"input\[0\] is a float"),
        ([0, 320], "token id 320 is outside the vocabulary of 320 tokens"),
        ([-1], "token id -1 is outside"),
        ([2**40], f"token id {2**40} is outside"),
        (np.array([3, -(2**31)]), "is outside"),
    ],
    ids=str,
)
def test_bad_tokens_are_refused(session: Session, tokens: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        session.forward(tokens)
    assert (session.length, session.pending) == (0, 0)
    session.forward([1])


def test_an_unknown_head_lists_the_valid_ones(session: Session) -> None:
    with pytest.raises(ConfigError, match="'last', 'all', 'none'"):
        session.forward([1], "some")  # type: ignore[arg-type]
    assert session.pending == 0


def test_a_second_forward_must_wait_for_the_commit(session: Session) -> None:
    session.forward([1, 2, 3])
    with pytest.raises(StateError, match=r"3 positions are pending; commit\(n\) or commit\(0\)"):
        session.forward([4])
    session.commit(2)
    session.forward([4])


def test_commit_needs_a_forward(session: Session) -> None:
    with pytest.raises(NothingPending, match=r"commit\(1\) without a forward"):
        session.commit(1)
    session.forward([1])
    session.commit(0)
    with pytest.raises(NothingPending):
        session.commit(0)


@pytest.mark.parametrize("n", [-1, 4, 100])
def test_commit_takes_no_more_than_is_pending(session: Session, n: int) -> None:
    session.forward([1, 2, 3])
    with pytest.raises(StateError, match=r"3 positions are pending; n must lie in 0\.\.3"):
        session.commit(n)
    session.commit(3)
    assert session.length == 3


def test_a_full_context_says_what_is_used_and_what_would_do(session: Session) -> None:
    session.forward(list(range(60)), "none")
    session.commit(60)
    with pytest.raises(
        ContextFull, match=r"^60 of 64 positions are used and 5 more were asked for; .* max_context >= 65$"
    ):
        session.forward([1, 2, 3, 4, 5])
    session.forward([1, 2, 3, 4])
    session.commit(4)
    with pytest.raises(ContextFull, match="64 of 64"):
        session.forward([1])
    assert (session.length, session.pending) == (64, 0)


def test_a_prompt_longer_than_the_context_is_refused_whole(session: Session) -> None:
    with pytest.raises(ContextFull, match="max_context >= 65"):
        session.forward(list(range(65)))
    assert session.length == session.pending == 0


@pytest.mark.parametrize("call", [lambda s: s.forward([1]), lambda s: s.commit(1), lambda s: s.reset()])
def test_a_closed_session_says_so(model_of: Load, call: Callable[[Session], object]) -> None:
    session = Session(model_of("equal"), 64)
    session.close()
    session.close()
    with pytest.raises(SessionClosed, match="open a new one"):
        call(session)


def test_the_output_of_a_closed_session_is_gone_unless_it_was_read(model_of: Load) -> None:
    session = Session(model_of("equal"), 64)
    output = session.forward([1, 2])
    most_likely = output.argmax
    session.close()
    assert output.argmax is most_likely
    with pytest.raises(SessionClosed):
        _ = output.logits


def test_every_proposal_is_read_where_it_lies(model_of: Load) -> None:
    """Draft sessions come and go; what one leaves in memory is not taken for the next, though it may lie there."""
    model = model_of("equal")
    with Session(model, 64) as session:
        for first in range(30):
            ids = np.arange(first, first + 16, dtype=np.int32)
            arena = Arena(model.backend, {"tokens": ((16,), GGMLType.I32)}, "a proposal")
            model.backend.write(arena["tokens"], ids)
            got = session.forward(DeviceProposal(arena, 4), "all").logits
            session.commit(0)
            wanted = session.forward(ids[:4], "all").logits
            session.commit(0)
            assert np.array_equal(got, wanted)
            arena.close()
            del arena  # an Arena made next often gets its place


def test_features_need_a_capture(session: Session) -> None:
    with pytest.raises(StateError, match="capture=<layers>"):
        _ = session.features


def test_more_positions_than_the_model_was_trained_on_warn_where_the_session_is_opened(model_of: Load) -> None:
    model = model_of("equal")
    with pytest.warns(ContextWarning, match=r"max_context is 4,097; .* was trained on 4,096 positions") as caught:
        Session(model, 4097).close()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session(model, 4096).close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_context": 0}, "max_context is 0; allowed: an integer, 1 to 16777216"),
        ({"max_context": -5}, "max_context"),
        ({"max_context": 10**9}, "max_context"),
        ({"cache_k": "q5_k"}, f"cache_k is 'q5_k'; valid values are {', '.join(CACHE_TYPES)}$"),
        ({"cache_v": "F16"}, "cache_v is 'F16'; valid values are"),
        ({"cache_v": ""}, "cache_v"),
        ({"k_rotation": "hadamard"}, "auto, none, hadamard-256, hadamard-128, hadamard-64, signed-128"),
        ({"k_rotation": "hadamard-256"}, "does not divide heads of 64; valid values are auto, none"),
        ({"chunk": 100}, "chunk is 100; valid values are 32, 64"),
        ({"chunk": 16}, "chunk is 16"),
        ({"k_rotation": "yes"}, "k_rotation is 'yes'"),
        ({"fused": 1}, "fused is 1; valid values are True, False"),
    ],
    ids=str,
)
def test_unknown_option_values_list_the_valid_ones(model_of: Load, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Session(model_of("equal"), **options)


def test_a_session_does_not_read_the_environment(model_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("K_ROTATION", "signed-128"), ("CACHE_V", "f64"), ("NOPE", "1")):
        monkeypatch.setenv(f"PYDFLASH_{name}", value)
    monkeypatch.setenv("DFLASH_SKIP_WHT", "1")
    with Session(model_of("equal"), 64, "q4_0") as session:
        assert session.cache_format.k_basis == "hadamard-64"


def test_an_unknown_option_is_refused(model_of: Load) -> None:
    with pytest.raises(TypeError, match="max_ctx"):
        Session(model_of("equal"), max_ctx=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("capture", [(4,), (-1,), (0, 99)])
def test_a_capture_outside_the_layers_is_refused(model_of: Load, capture: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"layers 0\.\.3"):
        Session(model_of("equal"), 64, capture=capture)


def test_a_context_that_no_memory_holds_is_an_error_with_its_size(model_of: Load) -> None:
    model = model_of("tied")
    width = model.config.kv_heads * model.config.head_size * 4
    needed = 2 * len(model.config.attention_layers) * (1 << 24) * width  # 64 GiB
    if model.backend.memory()[0] > needed:
        pytest.skip("this machine has room for it")
    with pytest.raises(OutOfMemory, match=r"16,777,216 positions needs .* bytes on cpu .* smaller max_context"):
        Session(model, 1 << 24, "f32", "f32")
    with Session(model, 64) as session:
        assert session.forward([1]).logits.shape == (1, 320)


def test_every_error_is_one_that_a_caller_can_catch(session: Session) -> None:
    calls: list[Callable[[], object]] = [
        lambda: session.forward([]), lambda: session.forward([10**6]), lambda: session.commit(1),
        lambda: session.forward([1] * 65), lambda: session.features,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(PydflashError):
            call()


def test_the_session_holds_one_copy_of_its_states_and_the_tape(model_of: Load) -> None:
    model = model_of("ratio3")
    with Session(model, 64) as session:
        specs = [spec for spec in session.state.specs if isinstance(spec, DeltaSpec)]
        assert len(specs) == len(model.config.delta_layers) == 3
        for what, shape in (
            ("rollback tape", specs[0].window_shape(TAPE_ROWS)),
            ("delta-net state", specs[0].state_shape),
        ):
            spare = session.state.sizes()[what] - len(specs) * 4 * math.prod(shape)
            assert 0 <= spare <= 64 * len(specs)  # alignment


def test_prefill_refuses_a_prompt_by_the_call(session: Session) -> None:
    for prompt, words in (([], "the prompt is empty"), ([1] * 65, "max_context >= 65"), ([-1], "token id -1")):
        with pytest.raises(PydflashError, match=words):
            session.prefill(prompt)
    session.forward([1])
    with pytest.raises(StateError, match="1 positions are pending"):
        session.prefill([1])
    session.commit(1)
    assert [output.count for output in session.prefill(np.array([1, 2, 3]))] == [3]


def test_a_proposal_that_lies_on_another_device_is_refused(session: Session, cpu: Backend) -> None:
    arena = Arena(cpu, {"tokens": ((16,), GGMLType.I32)}, "another model's proposal")
    with pytest.raises(ConfigError, match="belongs to another model"):
        session.forward(DeviceProposal(arena, 3))
    assert session.pending == 0
    arena.close()


def test_a_closed_model_is_told_whatever_is_asked_of_it(target_of: Callable[..., Any]) -> None:
    model = load_model(target_of("equal"), "cpu", threads=1)
    model.close()
    for ask in (
        lambda: Session(model, 64), lambda: load_draft("ngram", model), lambda: model.weights["output_norm.weight"],
        lambda: model.backend.synchronize(), lambda: Engine.share(model, None, EngineConfig()),
    ):  # fmt: skip
        with pytest.raises(SessionClosed):
            ask()
