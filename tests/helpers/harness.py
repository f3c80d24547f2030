"""Local tasks for lm-evaluation-harness, one of each kind of request that it makes."""

import json
import math
from pathlib import Path

import numpy as np

TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: 'Q: {{q}}\\nA:'\ndoc_to_choice: '{{options}}'\n"
    "doc_to_target: right\nmetric_list: [{metric: acc}, {metric: acc_norm}]",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    "said": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{text}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]",
}
ROWS = [
    {"q": f"what is {n}?", "options": ["yes", "perhaps, or not", "no"], "right": n % 3, "text": f"once {n} upon a time"}
    for n in range(12)
]


def write_tasks(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, content in TASKS.items():
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder / 'rows.jsonl'}'}}}}\ntest_split: test"
        )
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}\n{content}\n")
    return folder


def evaluate(lm, tasks: Path) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)


def check_same_numbers(ours: dict, theirs: dict) -> None:
    """Every figure, and every answer to every request."""
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert math.isclose(ours["results"][task][metric], value, rel_tol=1e-4), (task, metric)
        for own, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for a, b in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                same = a == b if isinstance(a, str) else np.allclose(a, b, rtol=1e-4)
                assert same, (task, a, b)
