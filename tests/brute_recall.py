"""Recall from a matrix of scores, query by query and item by item; shares nothing with what it checks."""
import random


def random_case(seed, images, *, most=7, least=1, values=3):
    """Integer scores [image][caption] with many ties and each caption's image, captions in random order."""
    rng = random.Random(seed)
    owner = [image for image in range(images) for _ in range(rng.randint(least, most))]
    rng.shuffle(owner)
    return [[rng.randint(-values, values) for _ in owner] for _ in range(images)], owner


def features(scores):
    """Image and caption features whose inner products are these very scores."""
    images = len(scores)
    return (
        [[float(i == j) for j in range(images)] for i in range(images)],
        [[float(scores[i][t]) for i in range(images)] for t in range(len(scores[0]))],
    )


def ranks(scores, owner, ties_count_against=True):
    """{"i2t": [rank of each image], "t2i": [rank of each caption]}."""
    i2t = []
    for image, row in enumerate(scores):
        mine = [row[t] for t in range(len(row)) if owner[t] == image]
        better = 0
        for t, score in enumerate(row):
            if owner[t] != image and (score > max(mine) or (ties_count_against and score == max(mine))):
                better += 1
        i2t.append(better + 1)
    t2i = []
    for t, image in enumerate(owner):
        better = 0
        for other in range(len(scores)):
            tie = ties_count_against and scores[other][t] == scores[image][t]
            if other != image and (scores[other][t] > scores[image][t] or tie):
                better += 1
        t2i.append(better + 1)
    return {"i2t": i2t, "t2i": t2i}


def median(values):
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def metrics(scores, owner, ks=(1, 5, 10)):
    found, lenient = ranks(scores, owner), ranks(scores, owner, ties_count_against=False)
    result = {}
    for way in ("i2t", "t2i"):
        for k in ks:
            result[f"{way}_r{k}"] = 100.0 * sum(rank <= k for rank in found[way]) / len(found[way])
        result[f"{way}_median_rank"] = median(found[way])
        result[f"{way}_mean_rank"] = sum(found[way]) / len(found[way])
        result[f"{way}_tied_queries"] = sum(a != b for a, b in zip(found[way], lenient[way], strict=True))
    result["rsum"] = sum(result[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in ks)
    result["rsum_if_ties_count_for"] = sum(
        100.0 * sum(rank <= k for rank in lenient[way]) / len(lenient[way]) for way in ("i2t", "t2i") for k in ks
    )
    return result | {"images": len(scores), "captions": len(owner)}


def first_captions(owner, count):
    """Numbers of the captions that are among the first `count` of their image."""
    seen, kept = {}, []
    for t, image in enumerate(owner):
        seen[image] = seen.get(image, 0) + 1
        if seen[image] <= count:
            kept.append(t)
    return kept


def of_folds(scores, owner, fold, ks=(1, 5, 10)):
    """The metrics of each fold, a data set of its own."""
    found = []
    for start in range(0, len(scores), fold):
        inside = [t for t, image in enumerate(owner) if start <= image < start + fold]
        part = [[scores[image][t] for t in inside] for image in range(start, start + fold)]
        found.append(metrics(part, [owner[t] - start for t in inside], ks))
    return found
