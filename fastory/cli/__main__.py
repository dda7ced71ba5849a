"""`python -m fastory.cli`, as `python -m fastory` is."""

from fastory.__main__ import main

if __name__ == "__main__":
    main()
