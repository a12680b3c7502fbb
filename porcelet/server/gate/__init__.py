"""Who gets in, and how much one may use: keys, logins, limits, and the guard in front of every route."""
