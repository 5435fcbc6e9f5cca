"""Published training runs as jobs and plans: reading the rows, building the models their sources trained."""
