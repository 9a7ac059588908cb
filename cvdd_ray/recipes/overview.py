"""What `cvdd recipes` shows: the recipes with a file of their own, and the words that the others are put together from."""

from rich.table import Table

from cvdd_ray.recipes import recipe_description, recipe_names
from cvdd_ray.recipes.composed import PATTERN, vocabulary


def rich_recipes() -> list[Table | str]:
    """Return what a terminal shows."""
    packaged = Table("recipe", "what it is", box=None)
    for name in recipe_names():
        packaged.add_row(name, recipe_description(name))
    words = Table("part", "word", "what it is", box=None)
    for kind, meanings in vocabulary().items():
        for row, (word, meaning) in enumerate(meanings.items()):
            words.add_row("" if row else kind, word, meaning)
    pattern = f"\nAs in the paper's tables: {PATTERN}, e.g. cifar100-ipc10-r50 or cifar100-ipc10-r50-sre2l++"
    return [packaged, pattern, words]
