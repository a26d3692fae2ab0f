"""Train the tiny pair from nothing and write everything that ships: `python3 -m tools.tiny.train --out DIR`.

Stages, each bounded by wall time: read the corpus, learn the vocabulary, train the target, write it (from here on the
target *is* the rounded weights of the file), let it continue training prompts, train the draft on what it wrote, write
the draft and the reference outputs. Nothing is written outside DIR.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from tools.tiny import corpus, export, reference, speculate, target, vocabulary
from tools.tiny.draft import Draft, DraftConfig, Pool, train_draft


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from the corpus, the machine and the number of steps in the time."""

    seed: int = 20_26
    vocab_size: int = 2048
    every_nth_file: int = 1
    recall_share: float = 0.15
    chat_share: float = 0.05
    target_batch: int = 32
    target_length: int = 1024
    draft_batch: int = 48
    draft_anchors: int = 128
    # (rows, prompt tokens, new tokens) of each pool of text that the target writes for the draft
    pools: tuple[tuple[int, int, int], ...] = ((2048, 64, 256), (2048, 160, 256), (1024, 640, 192))
    sampled_share: float = 0.25  # rows written at temperature 0.7 instead of greedily
    eval_batch: int = 16
    eval_rounds: int = 8
    eval_prompts: int = 32
    eval_tokens: int = 256
    run_prompts: int = 6
    run_tokens: int = 128
    max_target_steps: int = 1_000_000
    max_draft_steps: int = 1_000_000


SMOKE = replace(
    Settings(),
    every_nth_file=25,
    target_batch=2,
    target_length=128,
    draft_batch=2,
    draft_anchors=4,
    pools=((4, 24, 32), (2, 80, 32)),
    eval_batch=2,
    eval_rounds=1,
    eval_prompts=2,
    eval_tokens=8,
    run_prompts=2,
    run_tokens=8,
    max_target_steps=4,
    max_draft_steps=4,
)


class Journal:
    """Prints progress with the time since the start and keeps `train_log.json` up to date."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.facts = path, time.monotonic(), {}  # type: Path, float, dict[str, object]

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def record(self, **facts: object) -> None:
        """Add facts to the log file at once, so that an interrupted run leaves what it had."""
        self.facts |= facts | {"seconds": round(time.monotonic() - self.start, 1)}
        self.path.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        for name, value in facts.items():
            self.line(f"{name}: {json.dumps(value)}")


@dataclass(frozen=True)
class Text:
    """The corpus and its tokenised parts."""

    vocabulary: vocabulary.Vocabulary
    mixture: corpus.Mixture
    held_out: corpus.Ids
    prompts: list[corpus.Prompt]
    recalls: list[dict[str, object]]

    def prompt_ids(self, first: int, count: int) -> list[list[int]]:
        return [self.vocabulary.encode(p.text) for p in self.prompts[first : first + count]]


def prepare_text(root: Path | None, settings: Settings, out: Path, journal: Journal) -> Text:
    files = corpus.read_library(root)[:: settings.every_nth_file]
    training = [f for f in files if not f.held_out]
    journal.record(
        corpus_files=len(files), corpus_bytes=sum(len(f.text) for f in files), corpus_sha256=corpus.fingerprint(files)
    )
    learned = vocabulary.train((f.text for f in training), settings.vocab_size)
    journal.line("vocabulary learned")
    mixture = corpus.Mixture(training, learned, settings.recall_share, settings.chat_share)
    prompts = corpus.held_out_prompts(files, count=200, seed=settings.seed)
    recalls = list(corpus.recall_prompts(files, count=40, seed=settings.seed))
    corpus.write_held_out(out / "held_out.jsonl", prompts, recalls)
    held_out = corpus.joined(learned, [f.text + "<|endoftext|>" for f in files if f.held_out])
    journal.record(train_tokens=len(mixture.source), chat_tokens=len(mixture.chat), held_out_tokens=len(held_out))
    return Text(learned, mixture, held_out, prompts, recalls)


# --------------------------------------------------------------------------------------------------------- target
def evaluate_target(model: Qwen3_5ForCausalLM, text: Text, settings: Settings) -> dict[str, float]:
    """Held-out loss and the share of recall prompts answered, in float32."""
    torch.set_float32_matmul_precision("highest")
    loss = target.held_out_loss(
        model,
        text.held_out,
        text.vocabulary.byte_lengths(),
        batch=settings.eval_batch,
        length=settings.target_length,
        rounds=settings.eval_rounds,
    )
    recalls = text.recalls[:: 1 if settings.every_nth_file == 1 else 10]
    questions = [text.vocabulary.encode(str(r["prompt"])) for r in recalls]
    answers = [text.vocabulary.encode(str(r["answer"])) for r in recalls]
    return {**loss, "recall": target.recall_accuracy(model, questions, answers)}


def make_target(
    text: Text, settings: Settings, seconds: float, device: torch.device, out: Path, journal: Journal
) -> Qwen3_5ForCausalLM:
    """Train, measure and write the target; returns it with the rounded weights of the file."""
    model = target.build_target(settings.vocab_size, device)
    check = torch.from_numpy(text.held_out[:200])[None].to(device)
    journal.record(
        target_parameters=sum(p.numel() for p in model.parameters()),
        convolution_difference=target.check_fast_convolution(model.eval(), check),
    )
    torch.set_float32_matmul_precision("high")
    totals = target.train_target(
        model,
        text.mixture,
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


# ---------------------------------------------------------------------------------------------------------- draft
def write_pools(
    model: Qwen3_5ForCausalLM, text: Text, settings: Settings, seconds: float, journal: Journal
) -> list[Pool]:
    """Text written by the target after training prompts: what the draft will have to predict."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(settings.seed + 1)
    pools = []
    for n, (rows, prompt_length, new_tokens) in enumerate(settings.pools):
        prompts = torch.from_numpy(text.mixture.windows(rng, rows, prompt_length - 1)).to(device)
        temperature = torch.from_numpy(rng.random(rows) < settings.sampled_share).to(device) * 0.7
        ids: Tensor = target.continue_greedily(
            model,
            prompts,
            new_tokens,
            temperature=temperature,
            seconds=seconds / len(settings.pools),
            seed=settings.seed + n,
        )
        pools.append(Pool(ids, prompt_length))
        journal.line(f"target wrote {rows} x {ids.shape[1] - prompt_length} tokens after {prompt_length}")
    sample = pools[0].ids[0].tolist()
    journal.line("a greedy sample:\n" + text.vocabulary.decode(sample))
    return pools


def make_draft(
    model: Qwen3_5ForCausalLM, text: Text, settings: Settings, seconds: float, out: Path, journal: Journal
) -> Draft:
    """Train, measure and write the draft; returns it with the rounded weights of the file."""
    device = next(model.parameters()).device
    taps = target.target_layer_ids(model.config.num_hidden_layers)
    config = DraftConfig(target_layer_ids=tuple(taps), mask_token_id=text.vocabulary.id("<|mask|>"))
    draft = Draft(config).to(device)
    start = time.monotonic()
    pools = write_pools(model, text, settings, seconds / 3, journal)
    torch.set_float32_matmul_precision("high")
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
    torch.set_float32_matmul_precision("highest")
    prompts = text.prompt_ids(0, settings.eval_prompts)
    half = speculate.speculate(model, draft, prompts[: max(1, len(prompts) // 2)], settings.eval_tokens)
    journal.record(
        draft_parameters=sum(p.numel() for p in draft.parameters()),
        draft_training=totals,
        acceptance_length_trained=speculate.acceptance_length(half),
    )
    written = export.write_model(
        out / "tiny-draft.gguf",
        draft,
        export.draft_entries(config),
        export.draft_metadata(config, text.vocabulary, model.config.max_position_embeddings),
    )
    runs = speculate.speculate(model, draft, prompts, settings.eval_tokens)
    histogram = np.bincount([n for run in runs for n in run.lengths], minlength=config.block + 1)[1:].tolist()
    journal.record(
        draft_file=written,
        acceptance_length_rounded_same_prompts=speculate.acceptance_length(runs[: len(half)]),
        acceptance_length=speculate.acceptance_length(runs),
        accepted_histogram=histogram,
    )
    return draft


def write_draft_reference(model: Qwen3_5ForCausalLM, draft: Draft, text: Text, settings: Settings, out: Path) -> int:
    runs = speculate.speculate(model, draft, text.prompt_ids(100, settings.run_prompts), settings.run_tokens)
    for run in runs:
        run.output = run.output[: settings.run_tokens]  # the last verify may overshoot; its length is kept in full
    # The second prompt is longer than the sliding window.
    source = text.held_out.tolist()
    return reference.write_draft_reference(out / "tiny_draft.npz", model, draft, [source[:32], source[200:296]], runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--minutes-target", type=float, default=4.0, help="wall time for training the target")
    parser.add_argument("--minutes-draft", type=float, default=3.0, help="the same for the draft and its text")
    parser.add_argument("--target-steps", type=int, help="stop the target after this many steps")
    parser.add_argument("--draft-steps", type=int, help="stop the draft after this many steps")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--corpus", type=Path, help="a Python library folder (default: this interpreter's)")
    parser.add_argument("--smoke", action="store_true", help="a few small steps only: does everything run?")
    args = parser.parse_args()

    settings = replace(SMOKE if args.smoke else Settings(), seed=args.seed)
    settings = replace(
        settings,
        max_target_steps=args.target_steps or settings.max_target_steps,
        max_draft_steps=args.draft_steps or settings.max_draft_steps,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(settings.seed)
    journal = Journal(args.out / "train_log.json")
    journal.record(
        settings=asdict(settings),
        minutes_target=args.minutes_target,
        minutes_draft=args.minutes_draft,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )
    text = prepare_text(args.corpus, settings, args.out, journal)
    model = make_target(text, settings, 60 * args.minutes_target, device, args.out, journal)
    draft = make_draft(model, text, settings, 60 * args.minutes_draft, args.out, journal)
    journal.record(tiny_draft_bytes=write_draft_reference(model, draft, text, settings, args.out))
    sizes = {path.name: path.stat().st_size for path in sorted(args.out.iterdir())}
    journal.record(files=sizes)


if __name__ == "__main__":
    main()
