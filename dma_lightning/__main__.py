"""`python -m dma_lightning` runs the same commands as `dma-lightning`."""

from dma_lightning.cli import main

if __name__ == "__main__":
    main()
