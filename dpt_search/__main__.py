"""`python -m dpt_search`."""

from dpt_search.cli import entry

if __name__ == "__main__":
    entry()
