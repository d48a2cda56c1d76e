"""The errors that recipes and their runs raise; all derive from :class:`RecipeError`."""

from __future__ import annotations


class RecipeError(Exception):
    """Base class of every error raised on purpose by a recipe or its run."""


class UnknownRecipeError(RecipeError, LookupError):
    """No recipe of that name is in the library, and no file has that path."""


class UnknownKeyError(RecipeError, LookupError):
    """A recipe has a key, or a task an option, that does not exist."""


class InvalidRecipeError(RecipeError, ValueError):
    """A recipe is not YAML, lacks a key, or has a value of the wrong type or out of range."""


class PatternError(RecipeError, ValueError):
    """A pattern of a stage matches nothing in the student, or two of its parts claim the same weight."""


class BranchError(RecipeError, ValueError):
    """A stage activates a branch that the student's mixers do not have."""


class LossError(RecipeError, ValueError):
    """A loss of a stage cannot be computed here, or does not reach what the stage trains."""


class TeacherError(RecipeError, ValueError):
    """The teacher cannot be loaded, or is no model that can be distilled."""


class TeacherNotInstalledError(TeacherError, ImportError):
    """The package that holds the teacher's weights is missing."""


class UnknownTaskError(RecipeError, LookupError):
    """No dataset of that name is known."""


class RunError(RecipeError, ValueError):
    """The folder holds a run of another recipe."""


class CheckpointError(RecipeError, OSError):
    """A checkpoint is missing, truncated, does not fit the student, or could not be written."""


class LaunchError(RecipeError, RuntimeError):
    """The processes were launched in a way that training does not support."""


class NonFiniteLossError(RecipeError, ArithmeticError):
    """The loss became NaN or infinite."""
