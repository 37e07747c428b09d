#!/usr/bin/perl
# A function as a long-running HTTP server, with what every Debian has: it listens on $PORT and greets its caller.
use strict;
use warnings;
use IO::Socket::INET;

$SIG{CHLD} = 'IGNORE';
$SIG{TERM} = sub { exit 0 };

my $server = IO::Socket::INET->new(
    LocalAddr => '127.0.0.1', LocalPort => $ENV{PORT}, Listen => 128, ReuseAddr => 1,
) or die "cannot listen on port $ENV{PORT}: $!\n";

while (my $caller = $server->accept) {
    next if fork;    # the child serves the connection, the parent takes the next one
    close $server;
    $caller->autoflush(1);
    while (my $line = <$caller>) {
        my ($method, $target) = split / /, $line;
        my $length = 0;
        while (defined($line = <$caller>) && $line =~ /\S/) {
            $length = $1 if $line =~ /^content-length:\s*(\d+)/i;
        }
        my $body = '';
        read $caller, $body, $length if $length;
        my $answer = "Hello from process $$: $method $target" . ($length ? ", you said: $body" : '') . "\n";
        print $caller "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: ", length $answer, "\r\n\r\n$answer";
    }
    exit 0;
}
