"""CLIPScore (Hessel et al. 2021)."""

CLIP_SCORE_WEIGHT = 2.5


def clip_score(cosine: float) -> float:
    """CLIPScore: 2.5 times the cosine, at least 0."""
    return CLIP_SCORE_WEIGHT * max(cosine, 0.0)
