"""`python -m dgc_fastai ...` is the command `dgc ...`."""

from .cli.main import run

if __name__ == "__main__":
    run()
