"""The table of contents, and which chapter runs which section of the three surveys. Writes both into tutorial/README.md.

    python tutorial/index.py            after a chapter's header has changed
    python tutorial/index.py --printed  also runs all chapters, and keeps what they print in tutorial/printed/

What a written chapter says of itself (its docstring's fields) comes from its file; the plan below holds the rest. A,
B and C are arXiv:2407.12391, arXiv:2312.15234v2 and arXiv:2504.19720; C is cited by title, as its numbers differ
between versions.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {
    1: "Part I. The engine",
    9: "Part II. Cheaper tokens",
    14: "Part III. More than one device",
    21: "Part IV. Workloads and duties",
}
FIELDS = ("Survey", "Papers", "Code", "Minutes", "Kind", "Exercise", "Effect")

# Every section with content. "A II" and the like, which only open what follows, are left out.
SECTIONS = {
    "A": "II.A II.B III III.A III.B III.C IV IV.A IV.B IV.C V.A V.B VI.A VI.B VI.C".split(),
    "B": "2.1 2.2 2.3 2.4 3.1.1 3.1.2 3.1.3 3.2.1 3.2.2 3.2.3 3.2.4 3.2.5 4 5 6 7".split(),
    "C": [
        "Background",
        "Model Placement: Model Parallelism",
        "Model Placement: Offloading",
        "Request Scheduling: Inter-Request Scheduling",
        "Request Scheduling: Intra-Request Scheduling",
        "Decoding Length Prediction",
        "KV Cache Optimization: Memory Management",
        "KV Cache Optimization: Reuse Strategies",
        "KV Cache Optimization: Compression Techniques",
        "PD Disaggregation",
        "Cluster Optimization: Heterogeneous Resources",
        "Cluster Optimization: Service-Aware Scheduling",
        "Load Balancing",
        "Cloud-Based LLM Serving: Deployment and Computing Effective",
        "Cloud-Based LLM Serving: Cooperation with Edge Device",
        "Long Context: Parallel Processing",
        "Long Context: Attention Computation",
        "Long Context: KV Cache Management",
        "RAG: Workflow Scheduling",
        "RAG: Storage Optimization",
        "MoE: Expert Placement",
        "MoE: Expert Load Balancing",
        "MoE: All-to-All Communication",
        "LoRA",
        "Speculative Decoding",
        "Augmented LLMs",
        "Test-Time Reasoning",
        "Hardware",
        "Privacy",
        "Simulator",
        "Fairness",
        "Energy",
        "Future Works",
    ],
}
READING_ONLY = {"A": "I VII".split(), "B": "1 3 8".split(), "C": ["Miscellaneous Areas"]}  # what has nothing to run

# number: (file, topic, sections). A title without its part after the colon stands for all parts.
PLAN = {
    1: ("generate", "How a model writes", "A II.A, II.B · B 2.1, 2.3 · C Background"),
    2: ("roofline", "Where time and memory go", "A III, IV · B 2.2, 2.4, 7 · C Hardware"),
    3: (
        "measuring",
        "Measuring a server",
        "A III.A, IV.A, V.B · B 4, 5 · C Simulator, Cloud-Based LLM Serving: Deployment and Computing Effective",
    ),
    4: ("kernels", "Attention and kernels", "A VI.C · B 3.2.5, 4"),
    5: ("paging", "Paging", "A III.A · B 3.2.3 · C KV Cache Optimization: Memory Management"),
    6: (
        "prefix_reuse",
        "Reusing work",
        "A III.A, III.B · B 3.2.3, 7 · C KV Cache Optimization: Reuse Strategies, Request "
        "Scheduling: Inter-Request Scheduling, Long Context: KV Cache Management",
    ),
    7: ("batching", "Batching", "A IV.A · B 3.2.4, 3.2.5 · C Request Scheduling: Intra-Request Scheduling"),
    8: (
        "scheduling",
        "Scheduling policy",
        "A IV.A, V.B, VI.C · B 3.2.4 · C Request Scheduling: Inter-Request Scheduling, Decoding "
        "Length Prediction, Fairness",
    ),
    9: (
        "quantization",
        "Quantizing weights and activations",
        "A III.C · B 3.2.1 · C KV Cache Optimization: Compression Techniques",
    ),
    10: (
        "kv_compression",
        "Shrinking the KV cache",
        "A III.B, III.C · B 3.1.2, 3.2.1 · C KV Cache Optimization: Compression "
        "Techniques, KV Cache Optimization: Memory Management",
    ),
    11: ("speculation", "Speculative decoding", "A VI.C · B 3.1.1, 7 · C Speculative Decoding"),
    12: ("smaller_models", "Smaller models", "B 3.1.2, 3.1.3, 7 · C Long Context: KV Cache Management"),
    13: (
        "cascades",
        "A model for each request",
        "A VI.C · B 3.1.1 · C Cloud-Based LLM Serving: Cooperation with Edge Device",
    ),
    14: (
        "offloading",
        "Offloading and memory tiers",
        "A III.B, III.C, IV.C · B 3.1.3, 3.2.3 · C Model Placement: Offloading, KV Cache "
        "Optimization: Memory Management, Long Context: Attention Computation, Hardware",
    ),
    15: ("parallelism", "One model over many GPUs", "A IV.C · B 3.2.2 · C Model Placement: Model Parallelism"),
    16: ("long_context", "Long context", "A III.B · B 3.2.2, 7 · C Long Context"),
    17: (
        "disaggregation",
        "Prefill apart from decoding",
        "A III.B, IV.B · B 3.2.3, 3.2.4 · C PD Disaggregation, Cluster Optimization",
    ),
    18: ("load_balancing", "Many replicas", "A III.B, V.A · B 3.2.4 · C Load Balancing"),
    19: (
        "cloud_cost",
        "What the cloud costs",
        "A IV.C, V.A · B 3.2.2, 7 · C Cluster Optimization, Cloud-Based LLM Serving: Deployment "
        "and Computing Effective",
    ),
    20: ("edge", "Edge and decentralised serving", "A V.B · B 3.2.2, 4, 7 · C Cloud-Based LLM Serving, Hardware"),
    21: ("mixture_of_experts", "Mixture of experts", "A VI.B · B 3.1.2 · C MoE, Model Placement: Model Parallelism"),
    22: ("lora", "Many adapters", "A V.B · B 3.2.1, 7 · C LoRA"),
    23: ("rag", "Retrieval", "A VI.A · B 7 · C RAG"),
    24: (
        "agents_and_reasoning",
        "Agents and reasoning",
        "A VI.C · B 7 · C Augmented LLMs, Test-Time Reasoning, Future Works",
    ),
    25: (
        "power_privacy_fairness",
        "Power, carbon, privacy",
        "A V.B, VI.C · B 6, 7 · C Energy, Privacy, Cluster Optimization: "
        "Service-Aware Scheduling, Cloud-Based LLM Serving: Deployment and Computing Effective, Future Works",
    ),
}


def links(text: str) -> set[tuple[str, str]]:
    """{(survey, section)} of a line such as "A III.A · B 3.2.3 · C Request Scheduling: Inter-Request Scheduling".

    What stands in parentheses, and "v1", is passed over. A title that is only a part's name goes with the title before it;
    one that names no part stands for all parts. ValueError for what no survey has.
    """
    found = set()
    for piece in re.sub(r"\s*\([^)]*\)|\bv1 ", "", text).split("·"):
        survey, _, names = piece.strip().rstrip(".").partition(" ")
        whole, prefix = [*SECTIONS[survey], *READING_ONLY[survey]], ""
        for name in names.split(", "):
            name = name.strip()
            joined = f"{prefix}: {name}"
            name = joined if prefix and joined in whole else name
            prefix = name.partition(": ")[0]
            parts = (
                [name] if name in whole else [title for title in whole if title.startswith((name + ":", name + "."))]
            )
            if not parts:
                raise ValueError(f"survey {survey} has no section {name!r}")
            found |= {(survey, title) for title in parts}
    return found


def chapters() -> dict[int, dict[str, str] | None]:
    """{number: header fields, with `title` and `file`}, None for a chapter that is not written yet."""
    written: dict[int, dict[str, str] | None] = dict.fromkeys(PLAN)
    for number, (slug, *_) in PLAN.items():
        path = HERE / f"ch{number:02d}_{slug}.py"
        if path.exists():
            lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
            fields = dict(line.split(": ", 1) for line in re.sub(r"\n +", " ", "\n".join(lines[2:])).splitlines())
            written[number] = {"title": lines[0], "file": path.name, **fields}
    return written


def contents() -> str:
    """The chapters, part by part, as Markdown."""
    lines, written = [], chapters()
    for number, (_, topic, sections) in PLAN.items():
        if number in PARTS:
            lines += [
                "",
                f"### {PARTS[number]}",
                "",
                "| | chapter | surveys | minutes | effect measured | exercise |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
        fields = written[number]
        if fields:
            lines.append(
                f"| {number:02d} | [{topic}]({fields['file']}): {fields['title']} | {fields['Survey']} | "
                f"{fields['Minutes']} | "
                f"{fields['Effect']} | {fields['Exercise']} |"
            )
        else:
            lines.append(f"| {number:02d} | {topic} (to come) | {sections} | | | |")
    return "\n".join(lines[1:])


def section_map() -> str:
    """Every section of the surveys and what the tutorial does with it, as Markdown."""
    lines, written = ["| survey | section | run in | to come in |", "| --- | --- | --- | --- |"], chapters()
    for survey, sections in SECTIONS.items():
        for section in sections:
            about = [n for n, (_, _, text) in PLAN.items() if (survey, section) in links(text)]
            run = [
                f"{n:02d}" + " (simulated)" * fields["Kind"].startswith("simulated")
                for n in about
                if (fields := written[n])
            ]
            lines.append(
                f"| {survey} | {section} | {', '.join(run)} | {', '.join(f'{n:02d}' for n in about if not written[n])} |"
            )
        lines += [f"| {survey} | {section} | reading only | |" for section in READING_ONLY[survey]]
    return "\n".join(lines)


def fill_in(text: str) -> str:
    """A README with its generated parts, between <!-- name --> and <!-- end -->, as they ought to be."""
    for name, part in (("contents", contents()), ("sections", section_map())):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, part=part: m[1] + part + "\n" + m[2],
            text,
            flags=re.DOTALL,
        )
    return text


def run(file: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a chapter in a process of its own, with one thread."""
    return subprocess.run([sys.executable, HERE / file], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                          cwd=HERE.parent, capture_output=True, text=True)


def printed(file: str) -> Path:
    """Where what a chapter printed is kept."""
    return HERE / "printed" / Path(file).with_suffix(".txt").name


if __name__ == "__main__":
    if sys.argv[1:] == ["--printed"]:
        for fields in filter(None, chapters().values()):
            printed(fields["file"]).write_text(run(fields["file"]).stdout, encoding="utf-8")
    readme = HERE / "README.md"
    readme.write_text(fill_in(readme.read_text(encoding="utf-8")), encoding="utf-8")
