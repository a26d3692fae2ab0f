"""What follows from an engine's settings and its files, for ``settings`` and ``explain``."""

from __future__ import annotations

from collections.abc import Iterator

from pydflash.config import Setting
from pydflash.drafts import LoadedDraft, Proposer
from pydflash.machine import processors
from pydflash.runtime import Session

__all__ = ["derived"]


def _threads(count: int) -> str | None:
    """What to say of ``count`` threads: they wait for one another at every operation, so that none must be kept off."""
    usable = processors().usable
    if count > usable:
        return f"{count}, of which {usable} can run at once; that is many times slower than {usable}"
    return str(count) if count else None


def _trained(context: int, max_context: int) -> str:
    """The positions that the model was trained on, and what max_context asks for beyond."""
    if not context:
        return "the file does not say"
    beyond = f", {max_context - context:,} fewer than max_context" if max_context > context else ""
    return f"{context:,} positions{beyond}"


def derived(
    session: Session, draft: LoadedDraft | None, proposer: Proposer | None, draft_max: int | None, adaptive: bool
) -> Iterator[Setting]:
    """Effective values that are no settings themselves, each with what it comes from."""
    model, backend = session.model, session.model.backend
    yield Setting("model", str(model.path), "argument")
    yield Setting("device in use", f"{backend.name} ({backend.description})", "device")
    yield Setting("threads in use", _threads(backend.threads), "threads")
    yield Setting("weights", f"{model.weights.nbytes:,} bytes", "model")
    yield Setting("K basis", session.cache_format.k_basis, "k_rotation, cache_k, head size")
    yield Setting("V basis", session.cache_format.v_basis, "v_rotation")
    yield Setting("positions", f"{session.capacity:,}", "max_context")
    yield Setting("trained context", _trained(model.config.context, session.max_context), "model")
    if model.ignored:
        yield Setting("ignored in the model", ", ".join(model.ignored), "ignore")
    for what, size in session.state.sizes().items():
        yield Setting(what, f"{size:,} bytes", "model, max_context, cache_k, cache_v")
    if draft is None or proposer is None:
        return
    yield Setting("draft", str(draft.path), "argument")
    for name, value, source in draft.describe():
        yield Setting(name, value, source)
    for what, size in proposer.sizes().items():
        yield Setting(what, f"{size:,} bytes", "draft, max_context")
    most = draft.limit if draft_max is None else draft_max
    choice = "up to that many, as many as are expected to pay" if adaptive else "always as many as fit"
    yield Setting("most tokens of a proposal", f"{most}, {choice}", "draft_max, draft, adaptive, device")
