"""Drafts: one module a kind of proposer, and how long proposals should be."""

from pydflash.drafts.base import Proposer
from pydflash.drafts.dflash import Draft, DraftSession, load_draft
from pydflash.drafts.length import CycleCosts, ProposalLength, adapts
from pydflash.drafts.ngram import NGramProposer

__all__ = [
    "CycleCosts",
    "Draft",
    "DraftSession",
    "NGramProposer",
    "ProposalLength",
    "Proposer",
    "adapts",
    "load_draft",
]
