"""What is taken although somebody meant harm, and why that is right."""

__all__ = ["ACCEPTED"]

ACCEPTED: dict[str, str] = {}
