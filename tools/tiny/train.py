"""Train the tiny pair from nothing and write everything that ships: `python3 -m tools.tiny.train --out DIR`.
With `--target FILE`, train a new draft for a target of an earlier run.

Stages, each bounded by wall time: read the corpus, learn the vocabulary, train the target, write it (from here on the
target *is* the rounded weights of the file), let it continue training prompts, train the draft on what it wrote, write
the draft and the reference outputs. Nothing is written outside DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from pydflash.files import GGUFFile, replacing
from tools.tiny import corpus, export, reference, speculate, target, templates, vocabulary
from tools.tiny.draft import Draft, DraftConfig, Pool, observed, train_draft

# What the target reads; the rest of the windows is generated text.
TARGET_SHARES = corpus.Shares(source=0.17, recall=0.10, chat=0.05)
# What the draft trains on: more library source, where it misses most and so takes the most steps.
DRAFT_SHARES = corpus.Shares(source=0.45, recall=0.05, chat=0.05)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from the corpus, the machine and the number of steps in the time."""

    seed: int = 20_26
    text_seed: int = 20_26  # of what the target writes for the draft
    vocab_size: int = 2048
    every_nth_file: int = 1
    target_shares: corpus.Shares = TARGET_SHARES
    draft_shares: corpus.Shares = DRAFT_SHARES
    generated_characters: int = 40_000_000
    target_batch: int = 32
    target_length: int = 1024
    draft_batch: int = 48
    draft_anchors: int = 64
    # (rows, prompt tokens, new tokens) of each pool of text that the target writes for the draft. With `text_pool`
    # they have two lengths in all, since the training step is compiled once for each.
    pools: tuple[tuple[int, int, int], ...] = ((6144, 64, 384), (6144, 128, 320), (1536, 512, 288))
    pool_share: float = 0.4  # of the draft's time, at most, for writing them
    text_pool: tuple[int, int] = (6144, 448)  # (rows, tokens) of training text that the draft sees as well
    sampled_share: float = 0.25  # rows written at temperature 0.7 instead of greedily
    eval_batch: int = 16
    eval_rounds: int = 4
    prompts: int = 200
    eval_tokens: int = 256
    run_prompts: int = 6
    run_tokens: int = 128
    max_target_steps: int = 1_000_000
    max_draft_steps: int = 1_000_000


SMOKE = replace(
    Settings(),
    every_nth_file=25,
    generated_characters=200_000,
    target_batch=2,
    target_length=128,
    draft_batch=2,
    draft_anchors=4,
    pools=((4, 24, 32), (2, 80, 32)),
    text_pool=(4, 64),
    eval_batch=2,
    eval_rounds=1,
    prompts=10,
    eval_tokens=8,
    run_prompts=2,
    run_tokens=8,
    max_target_steps=4,
    max_draft_steps=4,
)


class Journal:
    """Prints progress with the time since the start and keeps the log file at `path` up to date."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.facts = path, time.monotonic(), {}  # type: Path, float, dict[str, object]

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def record(self, **facts: object) -> None:
        """Add facts to the log file at once, so that an interrupted run leaves what it had."""
        self.facts |= facts | {"seconds": round(time.monotonic() - self.start, 1)}
        with replacing(self.path) as file:
            file.write(json.dumps(self.facts, indent=1).encode() + b"\n")
        for name, value in facts.items():
            self.line(f"{name}: {json.dumps(value)}")


@dataclass(frozen=True)
class Text:
    """The corpus and its tokenised parts."""

    vocabulary: vocabulary.Vocabulary
    mixture: corpus.Mixture
    held_out: dict[str, corpus.Ids]  # "source" and "generated"
    prompts: list[corpus.Prompt]
    recalls: list[dict[str, object]]

    def prompt_ids(self, first: int, count: int) -> list[list[int]]:
        return [self.vocabulary.encode(p.text) for p in self.prompts[first : first + count]]


def prepare_text(
    root: Path | None, settings: Settings, known: vocabulary.Vocabulary | None, out: Path, journal: Journal
) -> Text:
    """Read and tokenise the corpus, with the vocabulary of an earlier run if it is `known`."""
    files = corpus.read_library(root)[:: settings.every_nth_file]
    training = [f for f in files if not f.held_out]
    journal.record(
        corpus_files=len(files), corpus_bytes=sum(len(f.text) for f in files), corpus_sha256=corpus.fingerprint(files)
    )
    learned = known or learn_vocabulary(training, settings)
    journal.line("vocabulary ready")
    mixture = corpus.Mixture(
        training,
        learned,
        characters=settings.generated_characters,
        longest_exercise=300 + 4 * settings.target_length,
        processes=max(1, (os.cpu_count() or 1) - 1),
        seed=settings.seed,
    )
    prompts = corpus.held_out_prompts(files, count=settings.prompts, seed=settings.seed)
    recalls = list(corpus.recall_prompts(files, count=40, seed=settings.seed))
    corpus.write_held_out(out / "held_out.jsonl", prompts, recalls)
    unseen = [d.text + "<|endoftext|>" for d in templates.documents(settings.seed, 400_000, held_out=True)]
    held_out = {
        "source": corpus.joined(learned, [f.text + "<|endoftext|>" for f in files if f.held_out]),
        "generated": corpus.joined(learned, unseen),
    }
    journal.record(
        train_tokens={k: len(getattr(mixture, k).ids) for k in ("generated", "source", "recall", "chat")},
        held_out_tokens={k: len(ids) for k, ids in held_out.items()},
    )
    return Text(learned, mixture, held_out, prompts, recalls)


def learn_vocabulary(training: list[corpus.SourceFile], settings: Settings) -> vocabulary.Vocabulary:
    sample = corpus.generated_texts(settings.seed, sum(len(f.text) for f in training))
    return vocabulary.train(itertools.chain((f.text for f in training), sample), settings.vocab_size)


# --------------------------------------------------------------------------------------------------------- target
def evaluate_target(model: Qwen3_5ForCausalLM, text: Text, settings: Settings) -> dict[str, object]:
    """Held-out loss for each kind of text and the share of recall prompts answered, in float32."""
    torch.set_float32_matmul_precision("highest")
    loss = {
        kind: target.held_out_loss(
            model,
            ids,
            text.vocabulary.byte_lengths(),
            batch=settings.eval_batch,
            length=settings.target_length,
            rounds=settings.eval_rounds,
        )
        for kind, ids in text.held_out.items()
    }
    recalls = text.recalls[:: 1 if settings.every_nth_file == 1 else 10]
    questions = [text.vocabulary.encode(str(r["prompt"])) for r in recalls]
    answers = [text.vocabulary.encode(str(r["answer"])) for r in recalls]
    return {**loss, "recall": target.recall_accuracy(model, questions, answers)}


def make_target(
    text: Text, settings: Settings, seconds: float, device: torch.device, out: Path, journal: Journal
) -> Qwen3_5ForCausalLM:
    """Train, measure and write the target; returns it with the rounded weights of the file."""
    model = target.build_target(settings.vocab_size, device)
    check = torch.from_numpy(text.held_out["source"][:200])[None].to(device)
    journal.record(
        target_parameters=sum(p.numel() for p in model.parameters()),
        fast_mixers_difference=target.check_fast_mixers(model.eval(), check),
    )
    torch.set_float32_matmul_precision("high")
    totals = target.train_target(
        model,
        text.mixture,
        settings.target_shares,
        seconds=seconds,
        max_steps=settings.max_target_steps,
        batch=settings.target_batch,
        length=settings.target_length,
        seed=settings.seed,
        log=journal.line,
    )
    journal.record(target_training=totals, target_trained=evaluate_target(model, text, settings))
    written = export.write_model(
        out / "tiny-target.gguf",
        model,
        export.target_entries(model.config),
        export.target_metadata(model.config, text.vocabulary),
    )
    journal.record(target_file=written, target_rounded=evaluate_target(model, text, settings))
    prompts = [ids[:24] for ids in text.prompt_ids(0, 3)]
    journal.record(tiny_logits_bytes=reference.write_target_reference(out / "tiny_logits.npz", model, prompts))
    return model


def load_target(file: GGUFFile, vocab_size: int, device: torch.device) -> Qwen3_5ForCausalLM:
    """The target of an earlier run, with the rounded weights of its file."""
    model = target.build_target(vocab_size, device)
    export.read_model(file, model, export.target_entries(model.config))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- draft
def written_texts(
    model: Qwen3_5ForCausalLM, text: Text, settings: Settings, seconds: float, journal: Journal
) -> list[tuple[Tensor, int]]:
    """Text that the target writes after training prompts, what the draft will have to predict, and training text.

    For each pool: token ids (rows, tokens) and where the written part begins.
    """
    device = next(model.parameters()).device
    rng = np.random.default_rng(settings.text_seed + 1)
    texts = []
    for n, (rows, prompt_length, new_tokens) in enumerate(settings.pools):
        prompts = text.mixture.prompts(rng, settings.draft_shares, rows, prompt_length)
        temperature = torch.from_numpy(rng.random(rows) < settings.sampled_share).to(device) * 0.7
        with target.fast_mixers():
            ids: Tensor = target.continue_greedily(
                model,
                torch.from_numpy(prompts).to(device),
                new_tokens,
                temperature=temperature,
                seconds=seconds / len(settings.pools),
                seed=settings.text_seed + n,
            )
        texts.append((ids, prompt_length - 1))
        journal.line(f"target wrote {rows} x {ids.shape[1] - prompt_length} tokens after {prompt_length}")
    for sample in texts[0][0][:3].tolist():
        journal.line("a sample:\n" + text.vocabulary.decode(sample))
    rows, length = settings.text_pool
    windows = text.mixture.windows(rng, settings.draft_shares, rows, length - 1)
    return [*texts, (torch.from_numpy(windows).to(device), 0)]


def save_texts(path: Path, texts: list[tuple[Tensor, int]]) -> None:
    arrays: dict[str, Any] = {}
    for n, (ids, first) in enumerate(texts):
        arrays |= {f"ids_{n}": ids.cpu().numpy().astype(np.uint16), f"first_{n}": first}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def read_texts(path: Path, device: torch.device) -> list[tuple[Tensor, int]]:
    with np.load(path) as file:
        count = len(file.files) // 2
        ids = [torch.from_numpy(file[f"ids_{n}"].astype(np.int64)).to(device) for n in range(count)]
        return [(ids[n], int(file[f"first_{n}"])) for n in range(count)]


def agree(pool: Pool) -> Tensor:
    """Share of tokens that are the target's first choice."""
    return (pool.choice[:, pool.first : -1] == pool.ids[:, pool.first + 1 :]).float().mean()


def draft_pools(
    model: Qwen3_5ForCausalLM,
    taps: list[int],
    text: Text,
    settings: Settings,
    seconds: float,
    earlier: list[Path],
    out: Path,
    journal: Journal,
) -> list[Pool]:
    """What the draft learns from: the texts of `earlier` runs, or else new ones, written in `seconds` and kept."""
    paths = earlier or [out / "texts.npz"]
    if not earlier:
        save_texts(paths[0], written_texts(model, text, settings, seconds, journal))
    device = next(model.parameters()).device
    pools = [observed(model, ids, first, taps) for path in paths for ids, first in read_texts(path, device)]
    journal.record(
        texts_sha256=[hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
        pool_tokens=[pool.ids.numel() for pool in pools],
        pool_agreement=[round(float(agree(pool)), 4) for pool in pools],
    )
    return pools


def make_draft(
    model: Qwen3_5ForCausalLM,
    text: Text,
    settings: Settings,
    seconds: float,
    earlier: list[Path],
    out: Path,
    journal: Journal,
) -> Draft:
    """Train, measure and write the draft; returns it with the rounded weights of the file."""
    device = next(model.parameters()).device
    taps = target.target_layer_ids(model.config.num_hidden_layers)
    config = DraftConfig(target_layer_ids=tuple(taps), mask_token_id=text.vocabulary.id("<|mask|>"))
    draft = Draft(config).to(device)
    start = time.monotonic()
    torch.set_float32_matmul_precision("high")
    pools = draft_pools(model, taps, text, settings, seconds * settings.pool_share, earlier, out, journal)
    totals = train_draft(
        draft,
        model,
        pools,
        seconds=seconds - (time.monotonic() - start),
        max_steps=settings.max_draft_steps,
        batch=settings.draft_batch,
        anchors=settings.draft_anchors,
        seed=settings.seed + 2,
        log=journal.line,
    )
    del pools
    written = export.write_model(
        out / "tiny-draft.gguf",
        draft,
        export.draft_entries(config),
        export.draft_metadata(config, text.vocabulary, model.config.max_position_embeddings),
    )
    journal.record(
        draft_parameters=sum(p.numel() for p in draft.parameters()), draft_training=totals, draft_file=written
    )
    journal.record(**evaluate_pair(model, draft, text, settings))
    return draft


def evaluate_pair(model: Qwen3_5ForCausalLM, draft: Draft, text: Text, settings: Settings) -> dict[str, object]:
    """Acceptance length over all held-out prompts, for each kind of prompt, and for each template; in float32."""
    torch.set_float32_matmul_precision("highest")
    with target.fast_mixers():
        runs = speculate.speculate(model, draft, text.prompt_ids(0, settings.prompts), settings.eval_tokens)
    kinds: dict[str, list[speculate.Run]] = {}
    for prompt, run in zip(text.prompts, runs, strict=True):
        kinds.setdefault(prompt.file if prompt.generated else "source", []).append(run)
    generated = [run for prompt, run in zip(text.prompts, runs, strict=True) if prompt.generated]
    histogram = np.bincount([n for run in runs for n in run.lengths], minlength=draft.config.block + 1)[1:].tolist()
    return {
        "acceptance_length": speculate.acceptance_length(runs),
        "acceptance_length_generated": speculate.acceptance_length(generated),
        "acceptance_length_source": speculate.acceptance_length(kinds["source"]),
        "acceptance_length_by_kind": {k: round(speculate.acceptance_length(v), 2) for k, v in sorted(kinds.items())},
        "accepted_histogram": histogram,
    }


def write_draft_reference(model: Qwen3_5ForCausalLM, draft: Draft, text: Text, settings: Settings, out: Path) -> int:
    runs = speculate.speculate(
        model, draft, text.prompt_ids(settings.prompts // 2, settings.run_prompts), settings.run_tokens
    )
    for run in runs:
        run.output = run.output[: settings.run_tokens]  # the last verify may overshoot; its length is kept in full
    # The second prompt is longer than the sliding window.
    source = text.held_out["source"].tolist()
    return reference.write_draft_reference(out / "tiny_draft.npz", model, draft, [source[:32], source[200:296]], runs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--target", type=Path, help="the target's file, if only a draft is to be trained")
    parser.add_argument("--texts", type=Path, action="append", default=[], help="a texts.npz of an earlier run")
    parser.add_argument("--text-seed", type=int, default=Settings.text_seed, help="of new texts for the draft")
    parser.add_argument("--minutes-target", type=float, default=4.0, help="wall time for training the target")
    parser.add_argument("--minutes-draft", type=float, default=3.0, help="the same for the draft and its text")
    parser.add_argument("--target-steps", type=int, help="stop the target after this many steps")
    parser.add_argument("--draft-steps", type=int, help="stop the draft after this many steps")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--corpus", type=Path, help="a Python library folder (default: this interpreter's)")
    parser.add_argument("--smoke", action="store_true", help="a few small steps only: does everything run?")
    args = parser.parse_args()
    if args.texts and not args.target:
        parser.error("--texts needs --target: a new target has a new vocabulary, in which they mean nothing")
    return args


def chosen_settings(args: argparse.Namespace) -> Settings:
    settings = SMOKE if args.smoke else Settings()
    return replace(
        settings,
        seed=args.seed,
        text_seed=args.text_seed,
        max_target_steps=args.target_steps or settings.max_target_steps,
        max_draft_steps=args.draft_steps or settings.max_draft_steps,
    )


def main() -> None:
    args = arguments()
    settings = chosen_settings(args)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    journal = Journal(args.out / ("draft_log.json" if args.target else "train_log.json"))
    file = GGUFFile.open(args.target) if args.target else None
    known = export.read_vocabulary(file) if file else None
    # Preparing the text forks, so it comes before any use of the device.
    text = prepare_text(args.corpus, settings, known, args.out, journal)
    device = torch.device(args.device)
    journal.record(
        settings=asdict(settings),
        minutes_target=0 if file else args.minutes_target,
        minutes_draft=args.minutes_draft,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )
    if file:
        model = load_target(file, len(text.vocabulary.tokens), device)
        journal.record(target_digest=file.full_digest(), target_rounded=evaluate_target(model, text, settings))
    else:
        model = make_target(text, settings, 60 * args.minutes_target, device, args.out, journal)
    draft = make_draft(model, text, settings, 60 * args.minutes_draft, args.texts, args.out, journal)
    journal.record(tiny_draft_bytes=write_draft_reference(model, draft, text, settings, args.out))
    sizes = {path.name: path.stat().st_size for path in sorted(args.out.iterdir())}
    journal.record(files=sizes)


if __name__ == "__main__":
    main()
