"""`python app.py ...` in a clone does what `dgc ...` does anywhere."""

from dgc_fastai.cli.main import run

if __name__ == "__main__":
    run()
