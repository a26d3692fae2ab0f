"""Sequences at work: the session's protocol, the graphs that run its steps, and what they give back."""

from pydflash.runtime.output import Output
from pydflash.runtime.pool import SessionPool
from pydflash.runtime.proposal import DeviceProposal, HostProposal, Proposal
from pydflash.runtime.runner import Head, width_for
from pydflash.runtime.session import Session
from pydflash.runtime.tokens import last_token, token_ids

__all__ = [
    "DeviceProposal",
    "Head",
    "HostProposal",
    "Output",
    "Proposal",
    "Session",
    "SessionPool",
    "last_token",
    "token_ids",
    "width_for",
]
