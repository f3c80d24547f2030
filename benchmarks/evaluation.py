"""The speed of evaluation: answers in a batch and one by one, likelihoods and the forward pass of training, the exam,
two models compared.

python benchmarks/evaluation.py                               # preset small; about five minutes on two cores
python benchmarks/evaluation.py --preset nano --rounds 3
python benchmarks/evaluation.py --weight out/full_sft_192.pth # the exam too, with weights that end their answers
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import machine, seconds, show
from common.files import ROOT
from dataset.read.questions import read_questions
from dataset.tiny_world import exam
from evaluation import likelihood
from evaluation.benchmark import run_benchmark
from evaluation.compare import compare, write_report
from evaluation.likelihood import log_likelihoods
from evaluation.measure import Settings
from evaluation.models import open_models
from evaluation.shared_prompts import Bundle, BundleLoader, Bundles
from inference.answers import answers_to_ids, prompt_ids
from model.checkpoint import open_weights, save_weights
from model.config import ModelConfig
from model.precision import pick_device, pick_dtype, prepare_for_inference
from model.transformer import CausalLM
from tokenizer.chat import Encoded, encode_chat
from tokenizer.text import Tokenizer


def answers_ratio(model, tokenizer, rows: int, tokens: int, rounds: int) -> None:
    """Every answer has the same number of tokens: no token ends one. One by one, 4 of the rows are timed."""

    class Endless(Tokenizer):
        stop_ids = frozenset()

    endless = Endless.load(tokenizer.path)
    asked = [[{"role": "user", "content": q.prompt}] for q in exam.draw_questions()[:: 600 // rows][:rows]]
    prompts = [prompt_ids(tokenizer, question) for question in asked]
    run = lambda own, size: answers_to_ids(model, endless, own, max_new_tokens=tokens, rows=size)
    together, alone = [], []
    for _ in range(rounds):
        together.append(rows * tokens / seconds(lambda: run(prompts, rows)))
        alone.append(4 * tokens / seconds(lambda: run(prompts[:: rows // 4][:4], 1)))
    ratio = statistics.median(together) / statistics.median(alone)
    show(f"answers, {rows} at once", together, "tokens/s")
    show("answers, one by one", alone, "tokens/s")
    show("at once against one by one", ratio, "times as fast", ">= 15 at 64 rows")


def likelihood_ratio(model, tokenizer, count: int, rounds: int) -> None:
    """Positions per second of the exam's questions with their answers, and of the forward pass of training on batches
    of the same rows: packed by the same loader, made beforehand."""
    questions = exam.draw_questions()
    rows = []
    for n in range(count):
        q = questions[n % len(questions)]
        answer = {"role": "assistant", "content": " ".join([q.answer] * (1 + n % 9))}
        rows.append(Encoded(*encode_chat(tokenizer, [{"role": "user", "content": q.prompt}, answer])))
    positions = sum(len(row.ids) - 1 for row in rows)
    data = Bundles(rows, [Bundle([], [n], len(row.ids) - 1) for n, row in enumerate(rows)])
    options = dict(packing=True, batch_size=likelihood.ROWS, max_seq_len=likelihood.WINDOW, shuffle=False)
    batches = BundleLoader(data, accumulation_steps=-(-count // likelihood.ROWS), **options).batches(0)
    device = model.model.embed_tokens.weight.device

    @torch.no_grad()
    def forward():
        for batch in batches:
            model(batch.to(device).tokens, **batch.to(device).context()).loss.sum().item()

    ours, training = [], []
    for _ in range(rounds):
        ours.append(positions / seconds(lambda: log_likelihoods(model, rows)))
        training.append(positions / seconds(forward))
    show("likelihoods", ours, "tokens/s")
    show("training's forward pass", training, "tokens/s")
    show("likelihoods against it", statistics.median(ours) / statistics.median(training), "times as fast", ">= 0.9")


def comparison(args) -> None:
    """Two models of the preset answer the 50 questions, each reads what the other said, and the report is written.
    The models are untrained, so no answer ends before --compare tokens: the most that it can take."""
    tokenizer = Tokenizer.load()
    recorded = dict(path=tokenizer.path, hash=tokenizer.hash)
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("full_sft", "rlhf")):
            torch.manual_seed(seed)
            model = CausalLM(ModelConfig.preset(args.preset))
            save_weights(Path(folder, f"{name}.pth"), model, tokenizer=recorded, lineage=[dict(stage=name)])

        def compare_both() -> None:
            paths = [str(Path(folder, f"{name}.pth")) for name in ("full_sft", "rlhf")]
            models = open_models(paths, folder, dtype=args.dtype)
            questions = read_questions(ROOT / "configs/test_questions.json")
            result = compare(models, questions, Settings(max_new_tokens=args.compare))
            write_report(Path(folder, "report.html"), result)

        show(f"comparing two models, 50 questions, {args.compare} tokens", seconds(compare_both), "s", "180 on 2 cores")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--weight", help="weights instead of a fresh model; the exam is then timed too")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--count", type=int, default=512, help="rows whose likelihood is computed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compare", type=int, default=256, help="tokens of an answer, where two models are compared")
    args = parser.parse_args()
    device = pick_device()
    torch.manual_seed(0)
    if args.weight:
        checkpoint, tokenizer = open_weights(args.weight)
        model = checkpoint.build()
    else:
        model, tokenizer = CausalLM(ModelConfig.preset(args.preset)), Tokenizer.load()
    dtype, _ = pick_dtype(args.dtype, device)
    model = prepare_for_inference(model, dtype).to(device)
    print(machine(), f"{model.num_parameters() / 1e6:.1f}M parameters, {dtype} on {device}", sep="\n")
    answers_ratio(model, tokenizer, args.rows, args.tokens, args.rounds)
    likelihood_ratio(model, tokenizer, args.count, args.rounds)
    if args.weight:
        run_benchmark(model, tokenizer)  # writes the tiny world, and the answers of the baselines stay in memory
        begin = time.perf_counter()
        result = run_benchmark(model, tokenizer)
        took = time.perf_counter() - begin
        show(f"the exam, {len(result['answers'])} answers", result["seconds"], "s", "6 with nano")
        show("the exam, in all", took, "s")
    comparison(args)


if __name__ == "__main__":
    main()
