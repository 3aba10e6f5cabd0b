"""`python -m dma_lightning`: the same as the console script."""

from dma_lightning.cli import main

if __name__ == "__main__":
    main()
