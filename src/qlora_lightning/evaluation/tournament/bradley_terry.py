"""Bradley-Terry strengths on the Elo scale: what the ratings would be if every match counted the same, in whatever order."""

import warnings
from dataclasses import dataclass

import numpy as np
import statsmodels.api as sm
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from qlora_lightning.evaluation.tournament.elo import SCALE, START, Z
from qlora_lightning.evaluation.tournament.matches import Floats, Matches


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths of the systems of some matches, in their order.

    Attributes:
        rating: [S] with the mean 1000 and Elo's scale.
        low: [S] lower end of the 95 % interval.
        high: [S] its upper end.
        drawn: whether the systems cannot all be told apart by wins, so that every system was given a draw against one of 1000 points.
    """

    rating: Floats
    low: Floats
    high: Floats
    drawn: bool


def bradley_terry(matches: Matches) -> BradleyTerry:
    """Fit a logistic regression of the wins (ties as half a win) on the two systems, by statsmodels.

    The interval takes verdicts on one question as one cluster. The strengths are finite only where no group of systems always wins (or
    always loses, or never plays) against the rest; else, as with a system that won all its matches, each system gets one more match, a
    draw against an imagined system of 1000 points.
    """
    size = len(matches.systems)
    drawn = connected_components(csr_array(matches.wins > 0), connection="strong")[0] > 1
    design, share, question = _rows(matches)
    if drawn:
        design = np.vstack([design, np.eye(size)])
        share = np.concatenate([share, np.full(size, 0.5)])
        question = np.concatenate([question, question.max() + 1 + np.arange(size)])
        names = np.eye(size)
    else:
        design, names = design[:, :-1], np.eye(size)[:, :-1]  # the last system is the zero of the scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half wins are no counts, and few questions make a rough interval: both are meant
        fit = sm.GLM(share, design, family=sm.families.Binomial()).fit(cov_type="cluster", cov_kwds={"groups": question})
    systems, unit = names - names.mean(0), SCALE / np.log(10)
    rating = START + unit * systems @ fit.params
    variance = np.diagonal(fit.cov_params(systems)).clip(0)  # where questions cancel out, rounding may leave it below 0
    error = unit * np.sqrt(variance)
    return BradleyTerry(rating, rating - Z * error, rating + Z * error, drawn)


def _rows(matches: Matches) -> tuple[Floats, Floats, Floats]:
    """[M, S] with 1 for the first system and -1 for the second, [M] the first's share, [M] the question."""
    design = np.zeros((len(matches), len(matches.systems)))
    every = np.arange(len(matches))
    design[every, matches.first], design[every, matches.second] = 1, -1
    return design, matches.share, matches.question.astype(float)
