#!/usr/bin/perl
# A function as a long-running HTTP server, in Perl, which every Debian has: it listens on $PORT and greets its client.
use strict;
use warnings;
use IO::Socket::INET;

$SIG{CHLD} = 'IGNORE';
$SIG{TERM} = sub { exit 0 };

my $server = IO::Socket::INET->new(
    LocalAddr => '127.0.0.1', LocalPort => $ENV{PORT}, Listen => 128, ReuseAddr => 1,
) or die "cannot listen on port $ENV{PORT}: $!\n";

while (my $client = $server->accept) {
    next if fork;    # the child serves the connection, the parent accepts the next one
    close $server;
    $client->autoflush(1);
    while (my $line = <$client>) {
        my ($method, $target) = split / /, $line;
        my $length = 0;
        while (defined($line = <$client>) && $line =~ /\S/) {
            $length = $1 if $line =~ /^content-length:\s*(\d+)/i;
        }
        my $body = '';
        read $client, $body, $length if $length;
        my $response = "Hello from process $$: $method $target" . ($length ? ", you said: $body" : '') . "\n";
        print $client "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: ", length $response, "\r\n\r\n$response";
    }
    exit 0;
}
