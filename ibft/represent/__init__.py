"""What a model's hidden states make of memorised rows: `ibft represent`."""
