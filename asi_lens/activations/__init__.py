"""One pass of the model, and what is kept of it: moments, spectra, stores."""
