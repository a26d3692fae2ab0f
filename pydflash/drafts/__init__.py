"""Drafts: one module a kind of proposer, which of them a file is, and how long proposals should be."""

from pydflash.drafts.base import LoadedDraft, Proposer
from pydflash.drafts.dflash import Draft, DraftSession
from pydflash.drafts.length import CycleCosts, ProposalLength, adapts
from pydflash.drafts.loading import is_name, load_draft
from pydflash.drafts.ngram import NGramDraft, NGramProposer

__all__ = [
    "CycleCosts",
    "Draft",
    "DraftSession",
    "LoadedDraft",
    "NGramDraft",
    "NGramProposer",
    "ProposalLength",
    "Proposer",
    "adapts",
    "is_name",
    "load_draft",
]
