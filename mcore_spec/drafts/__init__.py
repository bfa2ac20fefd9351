"""One algorithm a file. A draft knows neither the base model nor how it is trained, quantised or exported."""
