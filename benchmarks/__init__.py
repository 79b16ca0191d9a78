"""What the package is measured with: ``python -m benchmarks.compare`` and the other commands here."""
