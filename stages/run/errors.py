"""The one error a user's mistake may raise."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: one line saying what is wrong, where, and what to do."""
