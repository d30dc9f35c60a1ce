"""What differs by task. A task of your own: `docs/own_domain.md`."""

from limbeck.recipe_task import ArrayTask, Examples, register

__all__ = ["ArrayTask", "Examples", "register"]
